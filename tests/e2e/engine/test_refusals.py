"""What cannot work ends at start-up, in one line that names the key, the value and the range."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from vllm_ouroboros.integration.compat import check_version
from vllm_ouroboros.integration.plugin import register


@pytest.fixture(scope="module")
def configure(pair, tools):
    """Make an engine's configuration as ``LLM`` does before it loads anything."""
    from vllm.engine.arg_utils import EngineArgs

    register()

    def configure(nodes: int = 26, options: dict | None = None, **arguments):
        given = {"model": str(pair / "target"), "dtype": "float32", "max_model_len": 512}
        speculative = {"model": tools.PROPOSER, "num_speculative_tokens": nodes}
        options = {"draft_model": str(pair / "draft"), **(options or {})}
        return EngineArgs(
            **{
                **given,
                "speculative_config": speculative,
                "additional_config": {"ouroboros": options},
                **arguments,
            }
        ).create_engine_config()

    return configure


def refusal(configure, **arguments) -> str:
    """The line about Ouroboros in the error."""
    with pytest.raises(Exception) as caught:  # vLLM wraps it in a type of its own
        configure(**arguments)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    return max(lines, key=len)


def test_good_settings_pass(configure):
    config = configure()
    assert config.parallel_config.worker_cls.startswith("vllm_ouroboros.")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draft_token": 4}, ["draft_token", "unknown", "draft_tokens", "phrase_len"]),
        ({"draft_tokens": 0}, ["draft_tokens", "0", "1 to 64"]),
        ({"draft_tokens": "many"}, ["draft_tokens", "'many'", "1 to 64"]),
        ({"phrase_len": 0}, ["phrase_len", "0", "1 to 32"]),
        ({"num_suffixes": -1}, ["num_suffixes", "-1", "0 to 32"]),
        ({"window_size": -3}, ["window_size", "-3", "0 to 64"]),
        ({"guess_set_size": 65}, ["guess_set_size", "65", "1 to 64"]),
        ({"guess_set_size": 0}, ["guess_set_size", "0", "1 to 64"]),
        ({"pool_scope": "user"}, ["pool_scope", "'user'", "global", "request"]),
        ({"draft_model": 7}, ["draft_model", "7"]),
        ({"draft_model": "/no/such/model"}, ["draft_model", "/no/such/model"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_options(configure, options, words):
    line = refusal(configure, options=options)
    for word in words:
        assert word in line


def test_several_wrong_options_are_all_named(configure):
    line = refusal(configure, options={"draft_tokens": 0, "num_suffixes": -1, "typo": 1})
    for word in ("draft_tokens", "num_suffixes", "typo"):
        assert word in line


def test_options_that_are_no_object(configure):
    line = refusal(configure, additional_config={"ouroboros": ["draft"]})
    assert "ouroboros" in line
    assert "['draft']" in line


def test_budget_smaller_than_the_chain(configure):
    line = refusal(configure, nodes=4, options={"adaptive": False})
    for word in ("num_speculative_tokens", "4", "draft_tokens", "8"):
        assert word in line


def copy_model(source, folder, **changes):
    """A model folder with another config.json; the weights stay behind, no test reads them."""
    folder.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder / file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_draft_of_another_vocabulary_size(configure, pair, tmp_path):
    draft = copy_model(pair / "draft", tmp_path / "draft", vocab_size=5000)
    line = refusal(configure, options={"draft_model": str(draft)})
    for word in ("draft_model", str(draft), "5000", "4096"):
        assert word in line


def test_draft_of_another_vocabulary(configure, pair, tmp_path):
    draft = copy_model(pair / "draft", tmp_path / "draft")
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[1000:1002]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refusal(configure, options={"draft_model": str(draft)})
    for word in ("draft_model", str(draft), "2 tokens"):
        assert word in line


def test_draft_folder_without_a_model(configure, tmp_path):
    line = refusal(configure, options={"draft_model": str(tmp_path)})
    for word in ("draft_model", str(tmp_path), "config.json"):
        assert word in line


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0", None])
def test_vllm_version(version):
    (line,) = check_version(version)
    assert str(version) in line or version is None
    assert "0.32.0" in line
    assert "0.34.0" in line


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.33.0"])
def test_supported_vllm_version(version):
    assert check_version(version) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pipeline_parallel_size": 2}, ["pipeline_parallel_size = 2", "use 1"]),
        ({"enable_prompt_embeds": True}, ["enable_prompt_embeds = True", "use false"]),
        ({"kv_cache_dtype": "fp8", "dtype": "bfloat16"}, ["kv_cache_dtype = 'fp8'", "use auto"]),
        ({"kv_cache_dtype": "bfloat16"}, ["kv_cache_dtype", "bfloat16", "auto"]),  # 0.33 says it
        ({"kv_offloading_size": 1.0}, ["kv_offloading_size = 1.0", "use none"]),
        ({"worker_cls": "mine.Worker"}, ["worker_cls = 'mine.Worker'", "use auto"]),
        ({"scheduler_cls": "mine.Scheduler"}, ["scheduler_cls = 'mine.Scheduler'", "the default"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_engine_arguments(configure, arguments, words):
    line = refusal(configure, **arguments)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_model_len", 128),
        ("kv_cache_dtype", "bfloat16"),
        ("rejection_sample_method", "block"),
        ("draft_sample_method", "probabilistic"),
        ("parallel_drafting", True),
    ],
)
def test_options_of_vllms_own_speculation(configure, tools, field, value):
    """They would be ignored: the draft model is our own."""
    speculative = {"model": tools.PROPOSER, "num_speculative_tokens": 26, field: value}
    line = refusal(configure, speculative_config=speculative)
    assert f"speculative_config.{field} = {value!r} has no effect" in line


def test_a_draft_model_shared_by_other_ranks(configure, tools):
    speculative = {"model": tools.PROPOSER, "num_speculative_tokens": 26}
    line = refusal(configure, speculative_config={**speculative, "draft_tensor_parallel_size": 2})
    assert "draft_tensor_parallel_size = 2 cannot be had: use 1" in line


def test_numbers_by_batch_size_are_not_passed_over(configure, tools, caplog):
    """We refuse them; vLLM 0.33 drops them before it asks us, and says so."""
    field, value = "num_speculative_tokens_per_batch_size", [(1, 4, 26), (5, 8, 8)]
    speculative = {"model": tools.PROPOSER, "num_speculative_tokens": 26, field: value}
    try:
        configure(speculative_config=speculative)
    except Exception as error:
        assert f"speculative_config.{field} = {value!r} has no effect" in str(error)
    else:
        assert f"Disabling {field}" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enable_sleep_mode": True}, "Sleep mode is not supported"),
        ({"async_scheduling": True}, "sync scheduling is (only|not) supported"),
        ({"enable_return_routed_experts": True}, "requires Model Runner V2"),
        ({"enable_trace_replay": True}, "requires Model Runner V2"),
        ({"return_sampling_mask": True}, "requires Model Runner V2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_vllm_refuses_by_itself(configure, arguments, words):
    """Not our doing, but part of the table of what works: none of it is passed over in silence."""
    assert re.search(words, refusal(configure, **arguments))


MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
MAMBA = {
    "architectures": ["FalconH1ForCausalLM"],
    "model_type": "falcon_h1",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
}


@pytest.mark.parametrize(
    ("changes", "what"), [(MLA, "MLA"), (MAMBA, "state-space")], ids=["MLA", "Mamba hybrid"]
)
def test_target_architecture(configure, pair, tmp_path, changes, what):
    target = copy_model(pair / "target", tmp_path / "target", **changes)
    line = refusal(configure, model=str(target), options={"draft_model": None})
    for word in ("model", str(target), what):
        assert word in line


@pytest.mark.parametrize("changes", [MLA, MAMBA], ids=["MLA", "Mamba hybrid"])
def test_draft_architecture(configure, pair, tmp_path, changes):
    draft = copy_model(pair / "draft", tmp_path / "draft", **changes)
    line = refusal(configure, options={"draft_model": str(draft)})
    for word in ("draft_model", str(draft)):
        assert word in line


def test_an_engine_says_it_to_its_user(pair, tools):
    """The same line reaches whoever starts ``LLM``."""
    from vllm import LLM

    with pytest.raises(Exception, match=r"ouroboros\.draft_tokens = 0.*1 to 64"):
        LLM(
            **tools.BASE,
            speculative_config={"model": tools.PROPOSER, "num_speculative_tokens": 26},
            additional_config={"ouroboros": {"draft_tokens": 0}},
        )
