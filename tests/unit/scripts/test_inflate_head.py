"""An inflated head drafts what the small one drafts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "inflate"
sys.path.insert(0, str(SCRIPTS))

import inflate_dims  # noqa: E402
import inflate_head  # noqa: E402

from ..helpers.head_reference import head_config, random_head, reference  # noqa: E402

OLD = inflate_dims.Dims(32, 48, 2, 4, 2, 8, 64, True)
GROWTHS = {
    "nothing": {},
    "width": {"hidden_size": 128},
    "width that is no power of four": {"hidden_size": 96},
    "heads": {"num_attention_heads": 16, "num_key_value_heads": 4},
    "feed-forward": {"intermediate_size": 96},
    "all": {
        "hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 8,
        "intermediate_size": 144, "vocab_size": 100, "num_hidden_layers": 3,
    },
}  # fmt: skip


def saved(folder: Path, weights: dict[str, torch.Tensor], **more: object) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(head_config(weights, **more)))
    return folder


@pytest.mark.parametrize("growth", GROWTHS.values(), ids=GROWTHS)
@pytest.mark.parametrize("kind", [{}, {"sampling": False, "split": False}], ids=["FSPAD", "EAGLE"])
def test_features_and_logits_stay(tmp_path: Path, growth: dict, kind: dict) -> None:
    torch.manual_seed(1)
    weights, new = random_head(**kind), replace(OLD, **growth)
    source = saved(tmp_path / "small", weights)
    inflate_head.inflate_head(source, OLD, new, torch.float32, tmp_path / "big")
    big = load_file(tmp_path / "big/model.safetensors")
    config = json.loads((tmp_path / "big/config.json").read_text())
    assert big.pop("d2t").tolist() == [0] * 64  # all of the old tokens, and none that was added
    assert big.keys() == weights.keys()

    e, f = torch.randn(7, 32), torch.randn(7, 32)
    wide_e, wide_f = torch.randn(7, new.hidden_size), torch.zeros(7, new.hidden_size)
    wide_e[:, :32], wide_f[:, :32] = e, f  # what follows of an embedding must not matter
    expected = reference(weights, e, f)
    found = reference(big, wide_e, wide_f, eps=config["rms_norm_eps"])
    for small, large in zip(expected, found, strict=True):
        torch.testing.assert_close(large[:, :32], small, rtol=1e-5, atol=1e-5)
        assert not large[:, 32:].any()
    assert config["hidden_size"] == new.hidden_size
    assert config["draft_vocab_size"] == 64 and config["vocab_size"] == new.vocab_size
    sizes = {len(big["layers.0.mlp.gate_proj.weight"]), config["intermediate_size"]}
    assert sizes == {new.intermediate_size}


def test_a_short_vocabulary_stays(tmp_path: Path) -> None:
    weights = random_head() | {"d2t": torch.arange(20)}
    source = saved(tmp_path / "small", weights, draft_vocab_size=20)
    new = replace(OLD, hidden_size=128)
    inflate_head.inflate_head(source, OLD, new, torch.bfloat16, tmp_path / "big")
    big = load_file(tmp_path / "big/model.safetensors")
    assert torch.equal(big["d2t"], weights["d2t"])
    assert big["fc.fc.weight"].dtype == torch.bfloat16


def test_other_heads_are_refused(tmp_path: Path) -> None:
    new = replace(OLD, hidden_size=128)
    with pytest.raises(inflate_dims.InflateError, match=r"--head: .*none.* is no head"):
        inflate_head.inflate_head(tmp_path / "none", OLD, new, torch.float32, tmp_path / "out")
    wide = saved(tmp_path / "wide", random_head(hidden=64))
    with pytest.raises(inflate_dims.InflateError, match=r"features of 64 .* has 32"):
        inflate_head.inflate_head(wide, OLD, new, torch.float32, tmp_path / "out")
    odd = saved(tmp_path / "odd", random_head() | {"layers.1.norm.weight": torch.ones(32)})
    with pytest.raises(inflate_dims.InflateError, match=r"layers\.1\.norm"):
        inflate_head.inflate_head(odd, OLD, new, torch.float32, tmp_path / "out")
    assert not (tmp_path / "out").exists()
