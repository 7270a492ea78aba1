"""Sizes of Llama models: the presets of `inflate.py`, and which source fits into which."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

ARCHITECTURE = "LlamaForCausalLM"
LAYER_MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


class InflateError(Exception):
    """A user's mistake; the message names the option or key, its value and what to do."""


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes of a Llama model, under the names that config.json gives them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def from_config(cls, config: dict) -> Dims:
        """Reads config.json; raises InflateError for models that this script does not know."""
        architectures = config.get("architectures")
        if architectures != [ARCHITECTURE]:
            raise InflateError(
                f"architectures: {architectures} in the source's config.json; only "
                f"['{ARCHITECTURE}'] can be inflated"
            )
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise InflateError(
                    f"{key}: {config[key]} in the source's config.json; only models without "
                    "biases can be inflated"
                )
        for key in ("quantization_config", "inflated_from"):
            if config.get(key):
                raise InflateError(
                    f"{key}: {config[key]} in the source's config.json; start from the original"
                )
        try:
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            return cls(
                hidden_size=hidden,
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                vocab_size=config["vocab_size"],
                tie_word_embeddings=config.get("tie_word_embeddings", False),
            )
        except KeyError as error:
            raise InflateError(f"{error}: missing in the source's config.json; add it") from None

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all weights, in the order of the layers."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        values = self.num_key_value_heads * self.head_dim
        matrices = (
            (queries, hidden),
            (values, hidden),
            (values, hidden),
            (hidden, queries),
            (ffn, hidden),
            (ffn, hidden),
            (hidden, ffn),
        )
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            for name, shape in zip(LAYER_MATRICES, matrices, strict=True):
                yield f"model.layers.{layer}.{name}.weight", shape
            for name in LAYER_NORMS:
                yield f"model.layers.{layer}.{name}.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, hidden)

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden_size}, layers {self.num_hidden_layers}, heads "
            f"{self.num_attention_heads}/{self.num_key_value_heads} of {self.head_dim}, ffn "
            f"{self.intermediate_size}, vocabulary {self.vocab_size}, "
            f"{self.parameters / 1e6:,.1f} M parameters"
        )


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int = 0) -> dict:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    return sizes | ({"vocab_size": vocab} if vocab else {})


# What a preset does not name stays as in the source: the head size always does, so models with
# heads of 128 are given twice as many of 64. Projections and KV cache have the same bytes then.
PRESETS: dict[str, dict[str, dict]] = {
    "demo": {"target": _sizes(1024, 8, 16, 8, 2816), "draft": {}},
    "cpu": {"target": _sizes(1024, 24, 16, 8, 4096), "draft": {}},
    # Llama 3 8B and Llama 3.2 1B
    "8b": {
        "target": _sizes(4096, 32, 64, 16, 14336, vocab=128256),
        "draft": _sizes(2048, 16, 32, 8, 8192, vocab=128256),
    },
    # Code Llama 34B and TinyLlama 1.1B
    "34b": {
        "target": _sizes(8192, 48, 128, 16, 22016, vocab=32000),
        "draft": _sizes(2048, 22, 32, 4, 5632, vocab=32000),
    },
}


@dataclass(frozen=True, slots=True)
class Widening:
    """How a residual stream of `old` channels fills `new` ones.

    The channels stand there `copies` times, then zeros follow. The mean square over all channels is
    `zeros` times smaller than over the old ones, where `zeros` = new / (old * copies) is a power of
    four: the norms' epsilon divided by it and their weights divided by its root, a power of two,
    give the old values without rounding. Copies serve ratios that are no power of four; the norms'
    weights are zero at all copies but the first.
    """

    old: int
    new: int
    copies: int
    zeros: int

    @classmethod
    def of(cls, old: int, new: int) -> Widening:
        if new % old:
            raise InflateError(
                f"hidden_size: {new} is no multiple of the source's {old}, so the norms would "
                f"round; {max(new // old, 1) * old} or {(new // old + 1) * old} would do"
            )
        copies, zeros = new // old, 1
        while copies % 4 == 0:
            copies, zeros = copies // 4, zeros * 4
        return cls(old, new, copies, zeros)

    @property
    def norm_scale(self) -> float:
        return 1 / math.isqrt(self.zeros)

    @property
    def free_channel(self) -> int | None:
        """The first channel that is always zero."""
        return self.old * self.copies if self.zeros > 1 else None


def inflated_dims(old: Dims, sizes: dict) -> Dims:
    """The source's dimensions with `sizes` in their place; raises InflateError if they don't fit.

    `sizes` are those fields of Dims that change; `head_dim` and `tie_word_embeddings` cannot.
    """
    new = replace(old, **sizes)
    for key, size in asdict(new).items():
        if size < asdict(old)[key]:
            raise InflateError(
                f"{key}: {size} is less than the source's {asdict(old)[key]}; a model can only grow"
            )
    widening = Widening.of(old.hidden_size, new.hidden_size)
    if new.num_attention_heads % new.num_key_value_heads:
        raise InflateError(
            f"num_attention_heads: {new.num_attention_heads} is no multiple of "
            f"num_key_value_heads, {new.num_key_value_heads}; name a multiple"
        )
    if new.hidden_size % new.num_attention_heads:  # transformers refuses such a config.json
        raise InflateError(
            f"num_attention_heads: {new.num_attention_heads} does not divide hidden_size, "
            f"{new.hidden_size}; name a divisor"
        )
    needed = old.num_key_value_heads * kv_copies(old, new)
    if needed > new.num_key_value_heads:
        raise InflateError(
            f"num_key_value_heads: {new.num_key_value_heads} with {new.num_attention_heads} query "
            f"heads leaves {new.group} of them for each, the source has {old.group}; name at least "
            f"{needed} or more query heads"
        )
    if new.vocab_size > old.vocab_size and widening.free_channel is None:
        raise InflateError(
            f"vocab_size: {new.vocab_size} needs a channel that the source does not use, and "
            f"hidden_size {new.hidden_size} has none; make it {old.hidden_size * 4}, or keep the "
            f"source's vocabulary of {old.vocab_size}"
        )
    return new


def kv_copies(old: Dims, new: Dims) -> int:
    """How often each KV head of the source stands in the new model.

    More than once where fewer query heads share a KV head than in the source.
    """
    return -(-old.group // new.group)
