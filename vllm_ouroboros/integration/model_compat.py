"""Which models can be verified with trees, and which can draft for which."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ouroboros.config import ConfigError, OuroborosConfig
from vllm_ouroboros.heads.checkpoint import is_head

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def check_models(target: str, draft: str | None, config: dict[str, Any]) -> list[str]:
    """Problems of a planned command line, without starting an engine."""
    from vllm.config import ModelConfig

    try:
        parsed = OuroborosConfig.parse({**config, "draft_model": draft} if draft else config)
    except ConfigError as error:
        return [str(error)]
    try:
        model = ModelConfig(model=target)
    except Exception as error:
        return [f"model = {target!r} cannot be loaded: {reason(error)}"]
    problems = check_model("model", model)
    if parsed.draft_model is not None:
        problems += check_draft(parsed.draft_model, model)
    return problems


def check_model(key: str, model: ModelConfig) -> list[str]:
    """Why the architecture of a model cannot run with tree verification."""
    reasons = (
        (model.use_mla, "multi-head latent attention (MLA)"),
        (model.is_hybrid or model.is_attention_free, "state-space or linear attention layers"),
        (model.is_encoder_decoder, "an encoder-decoder architecture"),
        (model.runner_type == "pooling", "a pooling head"),
        (model.uses_mrope, "M-RoPE positions"),
        (model.attention_chunk_size is not None, "chunked local attention"),
        (model.rswa_window is not None, "a sliding window that keeps the prompt visible (R-SWA)"),
    )
    return [
        f"{key} = {model.model!r} has {what}, which Ouroboros cannot speculate on: "
        "use a dense decoder model, or drop --speculative-model"
        for bad, what in reasons
        if bad
    ]


def check_draft(draft: str, target: ModelConfig, parts: int = 1) -> list[str]:
    """Why a draft model cannot draft for a target, on so many ranks."""
    key = f"ouroboros.draft_model = {draft!r}"
    local = Path(draft)
    looks_local = local.is_absolute() or draft.startswith((".", "~"))
    if looks_local and not (local / "config.json").is_file():
        return [f"{key}: no such model directory (it must hold config.json)"]
    from vllm.config import ModelConfig

    try:
        model = ModelConfig(
            model=draft, runner="draft", tokenizer=target.tokenizer, dtype=target.dtype,
            trust_remote_code=target.trust_remote_code,
        )  # fmt: skip
    except Exception as error:
        return [f"{key} cannot be loaded: {reason(error)}"]
    if model.get_vocab_size() != target.get_vocab_size():
        return [
            f"{key} has a vocabulary of {model.get_vocab_size()} tokens, the target "
            f"{target.model!r} one of {target.get_vocab_size()}: both must share one tokenizer"
        ]
    problems = _compare_tokenizers(key, local, Path(target.tokenizer))
    heads = getattr(model.hf_text_config, "num_attention_heads", 0)
    if heads % parts:
        problems.append(
            f"{key} has {heads} attention heads, which {parts} ranks cannot share: use "
            "speculative_config.draft_tensor_parallel_size = 1 (not for heads), or a "
            "tensor_parallel_size that divides them"
        )
    if getattr(model.hf_text_config, "num_kv_shared_layers", 0):
        problems.append(
            f"{key} has layers that read another layer's KV cache, which a draft model must not: "
            "use another draft model, or phrases alone"
        )
    return problems + check_model("ouroboros.draft_model", model)


def _compare_tokenizers(key: str, draft: Path, target: Path) -> list[str]:
    """Whether two local tokenizers give the same ids to the same tokens."""
    files = [path / "tokenizer.json" for path in (draft, target)]
    if not all(file.is_file() for file in files):
        return []
    from tokenizers import Tokenizer

    mine, theirs = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    different = sorted(t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t))
    if not different:
        return []
    return [
        f"{key}: {len(different)} tokens have other ids than in the target's tokenizer "
        f"(for example {different[0]!r}): both models must share one tokenizer"
    ]


def reason(error: Exception) -> str:
    """What an exception says, in one line (the first of pydantic's says nothing)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        lines = lines[1:]
    return lines[0].split(" [type=")[0] if lines else repr(error)


def ranks_of_draft(vllm_config: VllmConfig, draft: str) -> int:
    """Ranks that share a draft model."""
    given = vllm_config.speculative_config.draft_tensor_parallel_size or 1
    return vllm_config.parallel_config.tensor_parallel_size if given > 1 or is_head(draft) else 1


def check_draft_parallel(vllm_config: VllmConfig, draft: str | None) -> list[str]:
    """Whether a draft model can be shared by so many ranks."""
    given = vllm_config.speculative_config.draft_tensor_parallel_size
    parallel = vllm_config.parallel_config
    size = parallel.tensor_parallel_size
    head = draft is not None and is_head(draft)
    whole = draft is not None and size > 1 == ranks_of_draft(vllm_config, draft)
    if whole and parallel.distributed_executor_backend == "external_launcher":
        return [
            "speculative_config.draft_tensor_parallel_size = 1 with distributed_executor_backend = "
            f"'external_launcher' is not supported with Ouroboros yet: use {size}, for its engines "
            "each plan their own KV cache"
        ]
    if given is None or given == size or (given == 1 and not head):
        return []
    fix = (
        f"{size}: a head shares the target's LM head"
        if head
        else " or ".join(dict.fromkeys(("1", str(size))))
    )
    return [f"speculative_config.draft_tensor_parallel_size = {given} cannot be had: use {fix}"]
