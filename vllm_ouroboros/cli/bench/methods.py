"""The ways to decode that the benchmark compares, and what each one's engine is started with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from vllm_ouroboros.config import PROPOSER, ConfigError, OuroborosConfig

VANILLA = "vanilla"
SEEN = "ouroboros-seen"
HEAD = "ouroboros-head-"
COMPARED = (
    VANILLA, "draft_model", "ngram", "suffix", "lookahead", "ouroboros-cold", "ouroboros-warm",
)  # fmt: skip
METHODS = (*COMPARED, "eagle", HEAD + "cold", HEAD + "warm", SEEN)
TITLES = {
    VANILLA: "vanilla vLLM",
    "draft_model": "vLLM draft_model",
    "ngram": "vLLM ngram",
    "suffix": "vLLM suffix",
    "lookahead": "lookahead (phrase pool only)",
    "ouroboros-cold": "Ouroboros, cold pool",
    "ouroboros-warm": "Ouroboros, warm pool",
    "eagle": "vLLM eagle",
    HEAD + "cold": "Ouroboros with a head, cold pool",
    HEAD + "warm": "Ouroboros with a head, warm pool",
    SEEN: "Ouroboros, pool that has seen the answers: a ceiling",
}
COLD = "phrase pool emptied before each run"
WARM = (
    "phrase pool emptied before each run, then filled by {} other prompts, untimed; a measured "
    "prompt is never among them"
)
KNOWN = (
    "phrase pool emptied before each run, then filled by the measured prompts and their answers, "
    "untimed: how fast drafts would be that are hardly ever wrong, not what anybody gets"
)
ONE_ENGINE = "no state beyond a request"
NO_HEAD = "no draft head: give --head"
NEW_ENGINE = "a new engine for each run: its cache holds no answer of an earlier run"


@dataclass(frozen=True)
class Method:
    """One way to decode with one setting.

    Attributes:
        name: one of `METHODS`.
        setting: what tells it from others of that name.
        rule: what a run starts with.
        speculative: vLLM's ``speculative_config``.
        ouroboros: ``additional_config["ouroboros"]`` where the engine is ours.
        pool: "cold", "warm" or "seen" where the engine is ours.
        fresh: whether each run needs a new engine.
        missing: why it cannot run here.
    """

    name: str
    setting: str = ""
    rule: str = ONE_ENGINE
    speculative: dict[str, Any] | None = field(default=None, hash=False)
    ouroboros: dict[str, Any] | None = field(default=None, hash=False)
    pool: str | None = None
    fresh: bool = False
    missing: str | None = None

    @property
    def title(self) -> str:
        """Name and setting, for people."""
        return f"{TITLES[self.name]} {self.setting}".strip()

    @property
    def engine(self) -> str:
        """Methods with the same one share an engine: ours can empty its pool."""
        return repr((self.speculative, self.ouroboros))

    @property
    def draft_tokens(self) -> int | None:
        """Forwards of the draft model for each step, where vLLM's own method has one."""
        if self.name not in ("draft_model", "eagle") or self.speculative is None:
            return None
        return int(self.speculative["num_speculative_tokens"])

    @property
    def rows(self) -> int:
        """Rows of a request in a verification at most."""
        return 1 + int((self.speculative or {}).get("num_speculative_tokens", 0))


def build(
    names: Sequence[str],
    *,
    draft_model: str | None,
    draft_tokens: Sequence[int],
    ngrams: Sequence[tuple[int, int, int]],
    suffixes: Sequence[tuple[float, float]],
    configs: Sequence[dict[str, Any]],
    nodes: int | None,
    others: int,
    head: str | None = None,
    draft_ranks: Sequence[int | None] = (None,),
) -> list[Method]:
    """All methods of those names, each setting one; ``others`` is the number of warm-up prompts.

    ``head`` is a draft head for vLLM's eagle and ours of that name, ``draft_ranks`` say how many
    ranks share our draft models.

    Without a draft model all of ours draw on the phrase pool alone: "lookahead" is then the same as
    "ouroboros-cold", and left out where that is there.

    Raises:
        ConfigError: options of Ouroboros that cannot work.
    """
    found: list[Method] = []
    if draft_model is None and "ouroboros-cold" in names:
        names = [name for name in names if name != "lookahead"]
    for name in dict.fromkeys(names):
        if name == VANILLA:
            found.append(Method(VANILLA))
        elif name in ("draft_model", "eagle"):
            found += _draft_models(name, head if name == "eagle" else draft_model, draft_tokens)
        elif name == "ngram":
            found += [_ngram(*setting) for setting in ngrams]
        elif name == "suffix":
            found += [_suffix(*setting) for setting in suffixes]
        elif name.startswith(HEAD) and head is None:
            found.append(Method(name, missing=NO_HEAD))
        else:
            draft = head if name.startswith(HEAD) else draft_model
            found += [
                _ours(name, options, draft, nodes, others, ranks)
                for options in configs
                for ranks in draft_ranks
            ]
    return list(dict.fromkeys(found))  # without a draft model its ranks make no difference


def _draft_models(name: str, draft: str | None, draft_tokens: Sequence[int]) -> list[Method]:
    """vLLM's own methods with a draft model or a head."""
    if draft is None:
        missing = NO_HEAD if name == "eagle" else "no draft model: give --draft-model"
        return [Method(name, missing=missing)]
    return [
        Method(
            name,
            f"K={k}",
            speculative={"method": name, "model": draft, "num_speculative_tokens": k},
        )
        for k in draft_tokens
    ]


def _ngram(shortest: int, longest: int, k: int) -> Method:
    return Method(
        "ngram",
        f"n={shortest}..{longest} K={k}",
        speculative={
            "method": "ngram",
            "prompt_lookup_min": shortest,
            "prompt_lookup_max": longest,
            "num_speculative_tokens": k,
        },
    )


def _suffix(factor: float, probability: float) -> Method:
    missing = None
    if find_spec("arctic_inference") is None:
        missing = "arctic-inference is not installed"
    return Method(
        "suffix",
        f"F={factor:g} P={probability:g}",
        rule=NEW_ENGINE,
        fresh=True,
        missing=missing,
        speculative={
            "method": "suffix",
            "suffix_decoding_max_spec_factor": factor,
            "suffix_decoding_min_token_prob": probability,
        },
    )


def _ours(
    name: str,
    options: dict[str, Any],
    draft_model: str | None,
    nodes: int | None,
    others: int,
    ranks: int | None,
) -> Method:
    missing = None
    if name == "lookahead":
        options = options | {"draft_model": None}
    elif "draft_model" not in options:  # else it is a setting, null included
        options = options | {"draft_model": draft_model}
    if options.get("pool_path") is not None:
        raise ConfigError(
            f"ouroboros.pool_path = {options['pool_path']!r}: the benchmark says itself what a "
            "pool holds; leave it out"
        )
    config = OuroborosConfig.parse(options)
    budget = nodes or config.usual_budget
    config.check_budget(budget)
    pool = "cold" if name == "lookahead" else name.rpartition("-")[2]
    if pool == "warm" and not missing and not others:
        missing = (
            "no other prompts to fill the pool: give --warm-prompts, or a --limit below the "
            "number of prompts in the file"
        )
    speculative: dict[str, Any] = {"model": PROPOSER, "num_speculative_tokens": budget}
    setting = _setting(config, options, budget, draft_model)
    if ranks is not None and options["draft_model"] is not None:
        speculative["draft_tensor_parallel_size"] = ranks
        setting += f", draft on {ranks} rank{'s' * (ranks > 1)}"
    return Method(
        name,
        setting,
        rule={"cold": COLD, "warm": WARM.format(others), "seen": KNOWN}[pool],
        speculative=speculative,
        ouroboros=options,
        pool=pool,
        missing=missing,
    )


def _setting(
    config: OuroborosConfig, options: dict[str, Any], nodes: int, usual: str | None
) -> str:
    sizes = f"β={config.phrase_len} W={config.window_size} G={config.guess_set_size}"
    if config.adaptive:
        text = f"adaptive {sizes}, at most {nodes} nodes"
    else:
        text = f"γ={config.draft_tokens} K={config.num_suffixes} {sizes}, {nodes} nodes"
    if options["draft_model"] is None:
        text += ", no draft model"
    elif options["draft_model"] != usual:
        text += f", draft model {options['draft_model']}"
    shown = {"draft_model", "adaptive", "draft_tokens", "num_suffixes", "phrase_len", "window_size"}
    shown.add("guess_set_size")
    return text + "".join(f", {key}={options[key]}" for key in sorted(options.keys() - shown))
