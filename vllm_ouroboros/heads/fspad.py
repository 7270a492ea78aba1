"""FSPAD's draft head (arXiv 2408.15562) as a vLLM model for the method ``eagle``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix

from vllm_ouroboros.heads.decoder_layer import HeadDecoderLayer
from vllm_ouroboros.heads.feature_sampling import FeatureSampling
from vllm_ouroboros.heads.short_vocabulary import ShortVocabulary

STACKED: dict[str, tuple[str, str | int]] = {
    "layers.0.self_attn.q_proj.": ("layers.0.self_attn.qkv_proj.", "q"),
    "layers.0.self_attn.k_proj.": ("layers.0.self_attn.qkv_proj.", "k"),
    "layers.0.self_attn.v_proj.": ("layers.0.self_attn.qkv_proj.", "v"),
    "layers.0.mlp.gate_proj.": ("layers.0.mlp.gate_up_proj.", 0),
    "layers.0.mlp.up_proj.": ("layers.0.mlp.gate_up_proj.", 1),
}
"""Parts of merged weights. Those of ``fc.mlp`` are not merged: their inputs differ."""
EMBEDDINGS = "model.embed_tokens.weight"


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0})
class FSPADModel(nn.Module):
    """Feature sampling and one decoder layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", first_layer: int = 0) -> None:
        super().__init__()
        config = _config(vllm_config)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        sampler_size = getattr(config, "sampler_size", config.intermediate_size)
        self.fc = FeatureSampling(
            config.hidden_size, sampler_size, config.rms_norm_eps, maybe_prefix(prefix, "fc")
        )
        split = getattr(config, "split_output", True)
        # vLLM finds the kind of a layer (`layer_types`, in Qwen's configurations) by this
        config.target_layer_count = first_layer
        name = maybe_prefix(prefix, f"layers.{first_layer}")
        layer = HeadDecoderLayer(config, vllm_config.cache_config, split, name)
        self.layers = nn.ModuleList([layer])

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `EagleFSPADLlamaForCausalLM.forward`."""
        sampled = self.fc(self.embed_tokens(input_ids), hidden_states)
        return self.layers[0](positions, sampled)


class EagleFSPADLlamaForCausalLM(nn.Module):
    """A draft head that shares embeddings and LM head with its target.

    Its configuration is Llama's with one layer, and may say ``sampler_size`` (intermediate size of
    feature sampling; null for none), ``split_output`` (false for EAGLE's single output) and
    ``draft_vocab_size`` (with a tensor ``d2t``).
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = _config(vllm_config)
        self.has_own_embed_tokens = self.has_own_lm_head = False
        target_layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        self.model = FSPADModel(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            first_layer=target_layers,
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)
        drafted = getattr(config, "draft_vocab_size", None) or config.vocab_size
        self.short: ShortVocabulary | None = None
        if drafted < config.vocab_size:
            self.short = ShortVocabulary(drafted, config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The target's embeddings [T, hidden] of token ids [T]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted features of the position after each row.

        Args:
            input_ids: [T], the token after each feature.
            positions: [T], of the features.
            hidden_states: [T, hidden], the target's features, or ones that were fed back.
            inputs_embeds: not supported.

        Returns:
            Features for the LM head and features to feed back, [T, hidden] each.
        """
        if inputs_embeds is not None:
            raise NotImplementedError(f"{type(self).__name__} takes token ids, not embeddings")
        return self.model(input_ids, positions, hidden_states)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [T, vocab] of features [T, hidden]."""
        if self.short is not None:
            return self.short.logits(self.lm_head, hidden_states)
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint in the layout of FSPAD's authors.

        Raises:
            ValueError: a tensor is missing or unknown.
        """
        parameters = dict(self.named_parameters())
        wanted = _checkpoint_names(parameters)
        for name, tensor in weights:
            if name not in wanted:
                raise ValueError(
                    f"draft head: unknown tensor {name!r}; it may have {', '.join(sorted(wanted))}"
                )
            target, shard = wanted.pop(name)
            parameter = parameters[target]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, tensor) if shard is None else loader(parameter, tensor, shard)
            self.has_own_embed_tokens |= target == EMBEDDINGS
        wanted = {name: at for name, at in wanted.items() if at[0] != EMBEDDINGS}
        if wanted:
            raise ValueError(f"draft head: tensors are missing: {', '.join(sorted(wanted))}")
        return {*parameters}


def _config(vllm_config: VllmConfig):
    """The head's own configuration."""
    assert vllm_config.speculative_config is not None
    return vllm_config.speculative_config.draft_model_config.hf_config


def _checkpoint_names(parameters: Iterable[str]) -> dict[str, tuple[str, str | int | None]]:
    """Names of a checkpoint's tensors, with the parameter and the part of it that each fills."""
    found: dict[str, tuple[str, str | int | None]] = {}
    for name in parameters:
        if name == "short.d2t":
            found["d2t"] = name, None
            continue
        short = name.removeprefix("model.")
        parts = [key for key, (merged, _) in STACKED.items() if short.startswith(merged)]
        for key in parts:
            merged, shard = STACKED[key]
            found[key + short.removeprefix(merged)] = name, shard
        if not parts:
            found[short] = name, None
    return found
