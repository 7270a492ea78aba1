"""Configurations of engines, as far as start-up checks read them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import vllm_ouroboros
from vllm_ouroboros.config import PROPOSER

PAIR = Path(vllm_ouroboros.__file__).parent / "assets" / "tiny-code"


def model(**changes) -> SimpleNamespace:
    fields = {
        "model": "target", "use_mla": False, "is_hybrid": False, "is_attention_free": False,
        "is_encoder_decoder": False, "runner_type": "generate", "uses_mrope": False,
        "tokenizer": "target", "dtype": "auto", "trust_remote_code": False,
        "enable_prompt_embeds": False, "attention_chunk_size": None, "rswa_window": None,
        "is_moe": False,
        "get_vocab_size": lambda: 4096,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


class PydanticField:
    """Stands where the default should, and holds it."""

    default = 4


@dataclasses.dataclass
class Speculative:
    """A few fields of vLLM's `SpeculativeConfig`."""

    method: str = "custom_class"
    model: str = PROPOSER
    num_speculative_tokens: int = 26
    prompt_lookup_max: int | None = 0  # vLLM's own doing
    target_model_config: object = dataclasses.field(default_factory=object)
    max_model_len: int | None = None
    parallel_drafting: bool = False
    rejection_sample_method: str = "standard"
    draft_tensor_parallel_size: int | None = None
    fly_entropy_window: int = PydanticField()

    def __post_init__(self) -> None:
        if isinstance(self.fly_entropy_window, PydanticField):
            self.fly_entropy_window = self.fly_entropy_window.default


def engine(*, parallel=(), cache=(), scheduler=(), options=(), **changes) -> SimpleNamespace:
    """An engine configuration that passes, but for the changes."""
    fields = {
        "additional_config": {"ouroboros": dict(options)},
        "num_speculative_tokens": 26,
        "speculative_config": Speculative(),
        "parallel_config": SimpleNamespace(
            **{
                "pipeline_parallel_size": 1, "tensor_parallel_size": 1,
                "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1,
                "data_parallel_size": 1, "enable_dbo": False, "worker_cls": "auto",
                "distributed_executor_backend": None,
                **dict(parallel),
            }
        ),
        "cache_config": SimpleNamespace(
            **{
                "cache_dtype": "auto",
                "kv_offloading_size": None,
                "kv_sharing_fast_prefill": False,
                **dict(cache),
            }
        ),
        "scheduler_config": SimpleNamespace(**{"scheduler_cls": None, **dict(scheduler)}),
        "kv_transfer_config": None,
        "lora_config": None,
        "model_config": model(),
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def shipped(**changes) -> SimpleNamespace:
    return model(model=str(PAIR / "target"), tokenizer=str(PAIR / "target"), **changes)
