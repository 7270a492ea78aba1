"""Unit tests of scripts/inflate/inflate.py: inflated models say what the shipped ones say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "inflate"
sys.path.insert(0, str(SCRIPTS))

import inflate  # noqa: E402
import inflate_dims  # noqa: E402
import inflate_weights  # noqa: E402
from inflate_dims import InflateError  # noqa: E402

PROMPTS = inflate.PAIR.parent / "prompts.jsonl"
NEW = 16

WIDTH = {"hidden_size": 1024}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
MORE_KV_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4}
FFN = {"intermediate_size": 1024}
DEPTH = {"num_hidden_layers": 8}
ALL = {**WIDTH, **MORE_KV_HEADS, **FFN, **DEPTH, "vocab_size": 5000}
GROWTHS = {  # of the target, but for those of the draft at the end
    "nothing": ("target", {}),
    "depth": ("target", DEPTH),
    "width": ("target", WIDTH),
    "width by copies": ("target", {"hidden_size": 768}),
    "query heads": ("target", HEADS),
    "KV heads": ("target", MORE_KV_HEADS),
    "copied KV heads": ("target", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "feed-forward": ("target", FFN),
    "vocabulary": ("target", {**WIDTH, "vocab_size": 5000}),
    "all": ("target", ALL),
    "draft, depth": ("draft", {"num_hidden_layers": 4}),
    "draft, width": ("draft", {"hidden_size": 512}),
    "draft, all": ("draft", {**ALL, "hidden_size": 2048}),
    "draft, all with copies": ("draft", {**ALL, "hidden_size": 1024}),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of 50 prompts, beginnings of the shipped ones, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(inflate.PAIR / "target")
    whole = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    rows = [tokenizer(text).input_ids for text in whole]
    ends = (8, 12, 16, 20, 24, 28, 32)
    ids = list(map(list, dict.fromkeys(tuple(row[:end]) for end in ends for row in rows)))[:50]
    assert len(ids) == 50
    longest = max(map(len, ids))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    return torch.tensor([[1] * (longest - len(row)) + row for row in ids]), mask


def greedy(model: LlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts [50, NEW] and the logits that chose them [50, NEW, vocabulary]."""
    ids, mask = prompts()
    result = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=1,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[:, ids.shape[1] :], torch.stack(result.logits, dim=1)


def load(directory: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@cache
def original(role: str) -> tuple[torch.Tensor, torch.Tensor]:
    return greedy(load(inflate.PAIR / role))


def inflation(
    source: Path, sizes: dict, dtype: torch.dtype = torch.float32
) -> inflate_weights.Inflation:
    model = inflate_weights.Source(source)
    return inflate_weights.Inflation(model, inflate_dims.inflated_dims(model.dims, sizes), dtype)


@pytest.mark.parametrize("growth", GROWTHS)
def test_greedy_texts_and_logits_are_the_sources(growth: str, tmp_path: Path):
    role, sizes = GROWTHS[growth]
    inflate.write(tmp_path / "model", inflation(inflate.PAIR / role, sizes), 10**9)
    model = load(tmp_path / "model")
    assert all(getattr(model.config, key) == size for key, size in sizes.items())
    texts, logits = greedy(model)
    expected_texts, expected = original(role)
    assert torch.equal(texts, expected_texts)
    known = expected.shape[-1]
    torch.testing.assert_close(logits[..., :known], expected, rtol=1e-4, atol=1e-4)
    assert logits.shape[-1] == sizes.get("vocab_size", known)
    if logits.shape[-1] > known:
        assert logits[..., known:].max() < -10_000
        assert (logits.softmax(-1)[..., known:] == 0).all()


def test_untied_embeddings(tmp_path: Path):
    torch.manual_seed(0)
    config = json.loads((inflate.PAIR / "draft/config.json").read_text())
    weights = load_file(inflate.PAIR / "draft/model.safetensors")
    weights["lm_head.weight"] = torch.randn(weights["model.embed_tokens.weight"].shape)
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sizes = {"hidden_size": 512, "vocab_size": 4500, "num_hidden_layers": 3}
    inflate.write(tmp_path / "new", inflation(tmp_path, sizes), 10**9)
    expected_texts, expected = greedy(load(tmp_path))
    texts, logits = greedy(load(tmp_path / "new"))
    assert torch.equal(texts, expected_texts)
    torch.testing.assert_close(logits[..., :4096], expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_rounds_nothing_of_the_source():
    made = inflation(inflate.PAIR / "target", ALL, torch.bfloat16)
    exact = inflation(inflate.PAIR / "target", ALL)
    shapes = dict(made.dims.tensors())
    for name in ("model.norm.weight", "model.layers.5.input_layernorm.weight"):
        assert torch.equal(made.tensor(name, shapes[name]).float(), exact.tensor(name, (1024,)))
    assert made.norm_eps == 1e-5 / 4


def test_fill_is_random_and_without_denormals(tmp_path: Path):
    made = inflation(inflate.PAIR / "target", ALL, torch.bfloat16)
    zero = ("o_proj", "down_proj", "embed_tokens", "norm")
    for name, shape in made.dims.tensors():
        tensor = made.tensor(name, shape).float()
        assert tensor.isfinite().all()
        assert not ((tensor != 0) & (tensor.abs() < 2.0**-100)).any()
        if not any(kind in name for kind in zero):
            assert (tensor == 0).float().mean() < 0.001
        assert torch.equal(tensor, made.tensor(name, shape).float())
    first, other = "model.layers.6.mlp.up_proj.weight", "model.layers.7.mlp.up_proj.weight"
    assert not torch.equal(made.tensor(first, (4, 4)), made.tensor(other, (4, 4)))


@pytest.mark.parametrize(
    "preset, role, millions",
    [
        ("demo", "target", 98.6),
        ("demo", "draft", 0.9),
        ("cpu", "target", 381.7),
        ("cpu", "draft", 0.9),
        ("8b", "target", 7504.9),
        ("8b", "draft", 1235.8),
        ("34b", "target", 33481.8),
        ("34b", "draft", 1034.5),
    ],
)
def test_sizes_of_presets(preset: str, role: str, millions: float):
    source = inflate_weights.Source(inflate.PAIR / role)
    dims = inflate_dims.inflated_dims(source.dims, inflate_dims.PRESETS[preset][role])
    assert round(dims.parameters / 1e6, 1) == millions
    config = LlamaConfig(**source.config | inflate.asdict(dims))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert model.num_parameters() == dims.parameters
    shapes = {name: tuple(t.shape) for name, t in model.named_parameters()}
    assert shapes == dict(dims.tensors())


def run(*arguments: object) -> str:
    result = CliRunner().invoke(inflate.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_command_writes_a_pair_in_shards_that_says_what_it_is(tmp_path: Path):
    small = {"target": DEPTH, "draft": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(inflate.PRESETS, "cpu", small)
        output = run("--out", tmp_path / "pair", "--shard-gb", 0.004)
    assert output.splitlines()[:2] == [
        "target: hidden 256, layers 8, heads 4/2 of 64, ffn 704, vocabulary 4096, 7.0 M "
        "parameters, bfloat16",
        "draft: hidden 128, layers 2, heads 2/1 of 64, ffn 352, vocabulary 4096, 0.9 M "
        "parameters, bfloat16",
    ]
    target = tmp_path / "pair/target"
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(target.glob("*.safetensors"))
    assert [f.name for f in files] == sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and all(f.stat().st_size < 4.1e6 for f in files)
    for name, file in index["weight_map"].items():
        with safe_open(target / file, framework="pt") as shard:
            assert shard.get_tensor(name).dtype == torch.bfloat16
    texts, _ = greedy(load(target))
    assert torch.equal(texts, original("target")[0])
    config = json.loads((target / "config.json").read_text())
    origin = config["inflated_from"]
    assert (origin["source"], origin["num_hidden_layers"]) == ("tiny-code/target", 6)
    assert "inflated_from" not in (tmp_path / "pair/draft/config.json").read_text()  # as it was
    assert AutoModelForCausalLM.from_pretrained(target).config.inflated_from == origin
    assert "inflated" in (target / "README.md").read_text()
    assert (tmp_path / "pair/draft/model.safetensors").exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (target / name).read_bytes() == (inflate.PAIR / "target" / name).read_bytes()
    with pytest.raises(InflateError, match=r"--out: '.*target' exists; remove"):
        run("--out", tmp_path / "pair", "--role", "target")
    (tmp_path / "other/head").mkdir(parents=True)
    with pytest.raises(InflateError, match=r"--out: '.*head' exists; remove"):
        run("--out", tmp_path / "other", "--role", "target", "--head", inflate.PAIR / "head")


def test_dry_run_writes_nothing(tmp_path: Path):
    output = run("--preset", "34b", "--out", tmp_path / "x", "--dry-run", "--vocab", 4096)
    assert "hidden 8192, layers 48, heads 128/16 of 64" in output and "4096" in output
    assert not (tmp_path / "x").exists()


TARGET = ("--role", "target")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((*TARGET, "--hidden-size", 1000), r"target: hidden_size: 1000 .* 768 or 1024"),
        ((*TARGET, "--hidden-size", 128), r"hidden_size: 128 is less than the source's 256"),
        ((*TARGET, "--heads", 17), r"num_attention_heads: 17 .* num_key_value_heads, 8"),
        ((*TARGET, "--heads", 24), r"num_attention_heads: 24 does not divide hidden_size, 1024"),
        ((*TARGET, "--heads", 3), r"num_attention_heads: 3 is less"),
        ((*TARGET, "--layers", 5), r"num_hidden_layers: 5 is less"),
        ((*TARGET, "--ffn", 64), r"intermediate_size: 64 is less"),
        ((*TARGET, "--vocab", 4000), r"vocab_size: 4000 is less"),
        (("--vocab", 5000), r"draft: vocab_size: 5000 needs a channel .* 512"),
        ((*TARGET, "--hidden-size", 768, "--vocab", 5000), r"hidden_size 768 has none"),
        (("--layers", 30), r"num_hidden_layers: .*--role target or draft"),
        (("--source", "/nowhere"), r"--source: '/nowhere/target' is no model directory"),
    ],
)
def test_refusals(arguments: tuple, message: str, tmp_path: Path):
    with pytest.raises(InflateError, match=message):
        run("--out", tmp_path / "x", *arguments)
    assert not (tmp_path / "x").exists()


def test_refuses_kv_heads_that_cannot_be_paired():
    old = inflate_weights.Source(inflate.PAIR / "target").dims
    old = replace(old, num_attention_heads=6, num_key_value_heads=2, hidden_size=768)
    with pytest.raises(InflateError, match=r"num_key_value_heads: 3 with 6 .* has 3; .* 4 or more"):
        inflate_dims.inflated_dims(old, {"num_key_value_heads": 3})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["MistralForCausalLM"]}, r"architectures: \['Mistral.*\['Llama"),
        ({"attention_bias": True}, r"attention_bias: True"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: .*original"),
        ({"inflated_from": {"source": "x"}}, r"inflated_from: .*original"),
        ({"hidden_size": None}, r"'hidden_size': missing"),
    ],
)
def test_refuses_models_it_does_not_know(change: dict, message: str):
    config = json.loads((inflate.PAIR / "target/config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(InflateError, match=message):
        inflate_dims.Dims.from_config(config)


def test_disk_too_small_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inflate.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(InflateError, match=r"0\.0 GB free and 0\.8 GB are needed"):
        run("--out", tmp_path, "--role", "target")
    assert not list(tmp_path.iterdir())


@given(old=st.integers(1, 64), ratio=st.integers(1, 200))
def test_widening_keeps_the_norm_without_rounding(old: int, ratio: int):
    w = inflate_dims.Widening.of(old, old * ratio)
    assert w.old * w.copies * w.zeros == w.new
    assert w.norm_scale**2 * w.zeros == 1 and w.copies % 4
    assert (w.free_channel is None) == (w.zeros == 1)


@settings(max_examples=200)
@given(
    kv=st.integers(1, 4),
    group=st.integers(1, 4),
    new_kv=st.integers(1, 16),
    new_group=st.integers(1, 8),
)
def test_heads_keep_their_kv_head(kv: int, group: int, new_kv: int, new_group: int):
    base = inflate_weights.Source(inflate.PAIR / "target").dims
    old = replace(base, num_attention_heads=kv * group, num_key_value_heads=kv, head_dim=2)
    sizes = {
        "num_attention_heads": new_kv * new_group,
        "num_key_value_heads": new_kv,
        "hidden_size": old.hidden_size * new_kv * new_group,
    }
    try:
        new = inflate_dims.inflated_dims(old, sizes)
    except InflateError as error:
        assert "num_" in str(error)
        return
    (places, heads), (kv_places, kv_heads) = inflate_weights.head_rows(old, new)
    assert heads.tolist() == list(range(kv * group * 2))
    assert len(set(places.tolist())) == len(places)
    assert len(set(kv_places.tolist())) == len(kv_places)
    assert max(places) < new_kv * new_group * 2 and max(kv_places) < new_kv * 2
    holder = dict(zip(kv_places.tolist(), kv_heads.tolist(), strict=True))
    for place, head in zip(places.tolist(), heads.tolist(), strict=True):
        kv_row = place // 2 // new_group * 2 + place % 2
        assert holder[kv_row] == head // 2 // group * 2 + head % 2


@given(
    layers=st.integers(1, 6),
    ffn=st.integers(1, 64),
    tied=st.booleans(),
    limit=st.integers(1, 40_000),
)
def test_shards_hold_every_tensor_once_within_the_limit(
    layers: int, ffn: int, tied: bool, limit: int
):
    dims = inflate_dims.Dims(16, ffn, layers, 4, 2, 4, 100, tied)
    shards = inflate.shard_names(dims, 2, limit)
    assert [item for group in shards.values() for item in group.items()] == list(dims.tensors())
    for group in shards.values():
        size = sum(torch.Size(shape).numel() * 2 for shape in group.values())
        assert size <= limit or len(group) == 1
    assert len(shards) == 1 or all(f"-of-{len(shards):05}." in name for name in shards)
