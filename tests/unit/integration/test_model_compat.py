"""Which models are refused at start-up, and in which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vllm_ouroboros.integration import compat, model_compat

from ..helpers.engine_configs import PAIR, Speculative, engine, model, shipped


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"use_mla": True}, "MLA"),
        ({"is_hybrid": True}, "state-space"),
        ({"is_attention_free": True}, "state-space"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"runner_type": "pooling"}, "pooling"),
        ({"uses_mrope": True}, "M-RoPE"),
        ({"attention_chunk_size": 8192}, "chunked local attention"),
        ({"rswa_window": 4096}, "keeps the prompt visible"),
    ],
)
def test_architectures_that_cannot_be_verified(changes, what) -> None:
    [problem] = compat.check_engine(engine(model_config=model(**changes)))
    assert problem.startswith("model = 'target' has ")
    assert what in problem


@pytest.mark.parametrize(
    "size, given, head, fix",
    [
        (2, None, False, None),
        (2, 1, False, None),
        (2, 2, False, None),
        (4, 2, False, "use 1 or 4"),
        (1, 2, False, "use 1"),
        (2, None, True, None),
        (2, 2, True, None),
        (2, 1, True, "use 2: a head shares the target's LM head"),
    ],
)
def test_ranks_that_share_a_draft_model(size, given, head, fix) -> None:
    config = engine(
        parallel={"tensor_parallel_size": size},
        speculative_config=Speculative(draft_tensor_parallel_size=given),
    )
    problems = model_compat.check_draft_parallel(config, str(PAIR / "head") if head else "draft")
    assert len(problems) == (fix is not None)
    if fix is not None:
        assert f"draft_tensor_parallel_size = {given}" in problems[0]
        assert fix in problems[0]


def test_engines_that_plan_alone_have_the_same_layers() -> None:
    """Under external_launcher each rank plans its KV cache from its own layers."""
    alike = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
    for given, draft, refused in ((1, "draft", 1), (2, "draft", 0), (None, None, 0)):
        speculative = Speculative(draft_tensor_parallel_size=given)
        config = engine(parallel=alike, speculative_config=speculative)
        problems = model_compat.check_draft_parallel(config, draft)
        assert len(problems) == refused
        assert all("external_launcher" in one and "use 2" in one for one in problems)


def test_heads_that_ranks_cannot_share() -> None:
    draft = str(PAIR / "draft")
    [problem] = model_compat.check_draft(draft, shipped(), 3)
    assert "2 attention heads, which 3 ranks cannot share" in problem
    for given, found in ((1, 0), (None, 0), (3, 1)):
        config = engine(
            parallel={"tensor_parallel_size": 3},
            speculative_config=Speculative(draft_tensor_parallel_size=given),
            options={"draft_model": draft},
            model_config=shipped(),
        )
        assert len(compat.check_engine(config)) == found


def copy_draft(where: Path, **changes) -> Path:
    """The shipped draft without its weights, its config changed."""
    shutil.copytree(PAIR / "draft", where, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**config, **changes}))
    return where


def test_the_shipped_pair_fits() -> None:
    assert model_compat.check_models(str(PAIR / "target"), str(PAIR / "draft"), {}) == []
    options = {"draft_model": str(PAIR / "draft")}
    assert compat.check_engine(engine(options=options, model_config=shipped())) == []


@pytest.mark.parametrize("draft", ["/no/such/dir", "./neither/this", "~/nor/that"])
def test_a_missing_draft_directory(draft) -> None:
    [problem] = compat.check_engine(engine(options={"draft_model": draft}))
    assert f"ouroboros.draft_model = {draft!r}" in problem
    assert "config.json" in problem


def test_a_directory_without_a_config(tmp_path) -> None:
    [problem] = model_compat.check_draft(str(tmp_path), model())
    assert "config.json" in problem


def test_another_vocabulary_size() -> None:
    target = shipped(get_vocab_size=lambda: 32000)
    [problem] = model_compat.check_draft(str(PAIR / "draft"), target)
    assert "vocabulary of 4096 tokens" in problem
    assert "32000" in problem
    assert str(PAIR / "target") in problem


def test_a_tokenizer_with_other_ids(tmp_path) -> None:
    draft = copy_draft(tmp_path / "draft")
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, two = sorted(vocab)[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    [problem] = model_compat.check_draft(str(draft), shipped())
    assert "2 tokens have other ids" in problem
    assert repr(one) in problem


def test_a_draft_without_a_tokenizer_of_its_own_is_taken_at_its_word(tmp_path) -> None:
    draft = copy_draft(tmp_path / "draft")
    (draft / "tokenizer.json").unlink()
    assert model_compat.check_draft(str(draft), shipped()) == []


def test_a_draft_that_cannot_be_loaded(tmp_path) -> None:
    draft = copy_draft(tmp_path / "draft", architectures=["NoSuchModel"], model_type="nothing")
    [problem] = model_compat.check_draft(str(draft), shipped())
    assert problem.startswith(f"ouroboros.draft_model = {str(draft)!r} cannot be loaded: ")
    assert "\n" not in problem


def test_a_draft_whose_layers_share_their_cache(tmp_path) -> None:
    draft = copy_draft(tmp_path / "draft", num_kv_shared_layers=2)
    [problem] = model_compat.check_draft(str(draft), shipped())
    assert "another layer's KV cache" in problem
    assert "use another draft model" in problem


def test_check_models_names_what_is_wrong(tmp_path) -> None:
    [problem] = model_compat.check_models(str(tmp_path), None, {})
    assert problem.startswith(f"model = {str(tmp_path)!r} cannot be loaded")
    [problem] = model_compat.check_models(str(PAIR / "target"), None, {"draft_tokens": 99})
    assert "ouroboros.draft_tokens = 99" in problem
    [problem] = model_compat.check_models(str(PAIR / "target"), "/no/such/dir", {})
    assert "no such model directory" in problem
