"""The vLLM model of a draft head against the formulas, and what checkpoints it takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config

from vllm_ouroboros.cli.inputs import TARGET
from vllm_ouroboros.heads.fspad import EagleFSPADLlamaForCausalLM

from ..helpers.head_reference import head_config, random_head, reference


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """vLLM's layers ask how many ranks there are."""
    from vllm.distributed import parallel_state
    from vllm.utils.network_utils import get_open_port

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo"
        )
        parallel_state.ensure_model_parallel_initialized(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


class CausalAttention(nn.Module):
    """In the place of vLLM's, which needs an engine."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.view(len(x), -1, 8).transpose(0, 1)[None] for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


def build(weights, **more) -> EagleFSPADLlamaForCausalLM:
    """The model of such a checkpoint, for the shipped target, before its weights are loaded."""
    config = VllmConfig()
    config.model_config = ModelConfig(model=str(TARGET), dtype="float32")
    config.compilation_config.mode = 0
    own = LlamaConfig(**head_config(weights, **more))
    with set_current_vllm_config(config):
        config.speculative_config = SimpleNamespace(
            draft_model_config=SimpleNamespace(hf_config=own), enable_adaptive_verification=False
        )
        head = EagleFSPADLlamaForCausalLM(vllm_config=config)
    head.model.layers[0].self_attn.attn = CausalAttention()
    return head


@pytest.mark.parametrize("sampling", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_forward_is_the_formulas(sampling, split) -> None:
    torch.manual_seed(1)
    weights = random_head(sampling=sampling, split=split)
    head = build(weights)
    head.load_weights(weights.items())
    head.model.embed_tokens.weight.data.normal_()
    for module in head.modules():  # as vLLM's loader does
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)
    tokens, features = torch.randint(0, 64, (11,)), torch.randn(11, 32)
    logit, regression = head(tokens, torch.arange(11), features)
    expected = reference(weights, head.embed_input_ids(tokens), features)
    torch.testing.assert_close(logit.double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(regression.double(), expected[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(logit, regression) == (not split)


def test_the_projections_of_feature_sampling_are_not_merged() -> None:
    head = build(random_head())
    names = dict(head.named_parameters())
    assert {"model.fc.mlp.gate_proj.weight", "model.fc.mlp.up_proj.weight"} <= names.keys()
    assert "model.layers.0.mlp.gate_up_proj.weight" in names


def test_a_checkpoint_is_loaded_whole_or_not_at_all() -> None:
    weights = random_head()
    head = build(weights)
    with pytest.raises(
        ValueError, match=r"unknown tensor 'fc\.weight'; it may have .*fc\.fc\.bias"
    ):
        head.load_weights([("fc.weight", torch.zeros(1))])
    some = [item for item in weights.items() if "q_proj" not in item[0] and "bias" not in item[0]]
    missing = r"missing: fc\.fc\.bias, layers\.0\.self_attn\.q_proj\.weight"
    with pytest.raises(ValueError, match=missing):
        head.load_weights(some)
    assert not head.has_own_embed_tokens
    head.load_weights([*weights.items(), ("embed_tokens.weight", torch.ones(64, 32))])
    assert head.has_own_embed_tokens
    assert (head.model.embed_tokens.weight[:64] == 1).all()


def test_a_short_vocabulary_leaves_all_other_tokens_out() -> None:
    weights, ids = random_head(), torch.tensor([2, 3, 7, 11, 60])
    weights["d2t"] = ids - torch.arange(5)
    head = build(weights, draft_vocab_size=5)
    head.load_weights(weights.items())
    rows = torch.randn(64, 32)
    shard = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=64)
    head.lm_head = SimpleNamespace(weight=rows, shard_indices=shard, tp_size=1)
    hidden = torch.randn(3, 32)
    logits = head.compute_logits(hidden)
    torch.testing.assert_close(logits[:, ids], hidden @ rows[ids].T)
    others = torch.ones(64, dtype=torch.bool)
    others[ids] = False
    assert (logits[:, others] == -torch.inf).all()
