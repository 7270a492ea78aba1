"""The symbols that the plugin replaces in vLLM, and when it leaves them alone."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_ouroboros.cli import inputs
from vllm_ouroboros.config import PROPOSER, ConfigError
from vllm_ouroboros.integration import compat, patches, plugin
from vllm_ouroboros.integration.patches import PATCHES, Patch

TARGET = str(inputs.TARGET)


def symbols() -> list[object]:
    return [patch.owner().__dict__.get(patch.name) for patch in PATCHES]


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


def test_registering_again_changes_nothing() -> None:
    before = symbols()
    plugin.register()
    plugin.register()
    patches.apply_all()
    assert symbols() == before


def test_a_vllm_that_has_changed_is_left_alone(monkeypatch, caplog) -> None:
    def apply_all():
        raise AttributeError("no add_cli_args")

    monkeypatch.setattr(patches, "apply_all", apply_all)
    plugin.register()
    assert "Ouroboros is off" in caplog.text
    assert "no add_cli_args" in caplog.text


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_patches_are_documented_and_applied(patch) -> None:
    assert len(patch.why) > 10
    assert len(patch.remove_when) > 10
    assert patch.upstream.startswith("vllm.")
    assert patch.upstream.endswith(f".{patch.name}")
    with pytest.raises(RuntimeError, match="patched already"):
        patch.apply()


def make_patch(owner: type, name: str, wrap) -> Patch:
    return Patch(lambda: owner, name, wrap, "because", f"vllm.{name}", "never")


def test_a_patch_refuses_to_wrap_itself() -> None:
    class Base:
        @classmethod
        def inherited(cls) -> str:
            return cls.__name__

    class Owner(Base):
        @staticmethod
        def own() -> str:
            return "own"

    def louder(original):
        return staticmethod(lambda: original.__func__() + "!")

    def louder_class(original):
        return classmethod(lambda cls: original.__func__(cls) + "!")

    for patch in (make_patch(Owner, "own", louder), make_patch(Owner, "inherited", louder_class)):
        patch.apply()
        with pytest.raises(RuntimeError, match="patched already"):
            patch.apply()
    assert Owner.own() == "own!"
    assert Owner.inherited() == "Owner!"
    assert Base.inherited() == "Base", "the base class is not ours"


# -- choosing the worker ---------------------------------------------------------------------------


def configuration(method="custom_class", model=PROPOSER) -> SimpleNamespace:
    return SimpleNamespace(
        speculative_config=method and SimpleNamespace(method=method, model=model),
        parallel_config=SimpleNamespace(worker_cls="auto"),
        scheduler_config=SimpleNamespace(scheduler_cls=None),
        attention_config=SimpleNamespace(backend=None),
    )


@pytest.fixture
def platform(monkeypatch):
    """A platform with the patched check; ``problems`` is what the engine check will find."""
    state = SimpleNamespace(problems=[], checked=0, passed=[])

    class Platform:
        @classmethod
        def check_and_update_config(cls, vllm_config) -> None:
            state.passed.append((cls, vllm_config, vllm_config.parallel_config.worker_cls))

    def check_engine(vllm_config):
        state.checked += 1
        return state.problems

    monkeypatch.setattr(patches, "check_engine", check_engine)
    original = Platform.__dict__["check_and_update_config"]
    Platform.check_and_update_config = patches._wrap_check(original)
    state.cls = Platform
    return state


@pytest.mark.parametrize(
    "config",
    [configuration(None), configuration("ngram"), configuration(model="other.Proposer")],
    ids=["no speculation", "ngram", "another proposer"],
)
def test_other_engines_pass_untouched(platform, config) -> None:
    platform.problems = ["must not be asked"]
    platform.cls.check_and_update_config(config)
    assert config.parallel_config.worker_cls == "auto"
    assert config.scheduler_config.scheduler_cls is None
    assert platform.passed == [(platform.cls, config, "auto")]
    assert platform.checked == 0


def test_our_engine_gets_our_worker_and_scheduler(platform) -> None:
    config = configuration()
    platform.cls.check_and_update_config(config)
    assert config.parallel_config.worker_cls == compat.worker()
    assert config.scheduler_config.scheduler_cls == compat.SCHEDULER
    assert platform.passed == [(platform.cls, config, compat.worker())]  # before vLLM's own check
    platform.problems = ["a draft's configuration is a copy of one that was checked"]
    platform.cls.check_and_update_config(config)
    assert platform.checked == 1


def test_problems_end_the_start(platform) -> None:
    platform.problems = ["one thing", "another"]
    config = configuration()
    with pytest.raises(ConfigError, match="one thing; another"):
        platform.cls.check_and_update_config(config)
    assert platform.passed == []
    assert config.parallel_config.worker_cls == "auto"


def test_worker_and_scheduler_exist() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.cpu_worker import CPUWorker

    for name, base in ((compat.worker(), CPUWorker), (compat.SCHEDULER, Scheduler)):
        module, _, attribute = name.rpartition(".")
        found = getattr(__import__(module, fromlist=[attribute]), attribute)
        assert issubclass(found, base)


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    plugin.register()
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def parse(parser, *arguments: str) -> EngineArgs:
    return EngineArgs.from_cli_args(parser.parse_args(["--model", TARGET, *arguments]))


@pytest.mark.parametrize("flag", ["--speculative-model", "--spec-model"])
def test_both_spellings_choose_the_proposer(parser, flag) -> None:
    args = parse(parser, flag, PROPOSER, "--spec-tokens", "26")
    assert args.spec_model == PROPOSER
    assert args.spec_tokens == 26


def test_without_our_flags_nothing_is_added(parser) -> None:
    args = parse(parser)
    assert args.spec_model is None
    assert not args.additional_config
    assert parse(parser, "--additional-config", '{"a": 1}').additional_config == {"a": 1}


def test_ouroboros_config_becomes_additional_config(parser) -> None:
    args = parse(parser, "--ouroboros-config", '{"draft_model": "D", "phrase_len": 4}')
    assert args.additional_config == {"ouroboros": {"draft_model": "D", "phrase_len": 4}}


def test_ouroboros_config_merges(parser) -> None:
    args = parse(
        parser,
        "--ouroboros-config", '{"draft_model": "D"}',
        "--additional-config", '{"other": [1], "ouroboros": {"phrase_len": 4}}',
    )  # fmt: skip
    assert args.additional_config == {
        "other": [1],
        "ouroboros": {"phrase_len": 4, "draft_model": "D"},
    }


def test_a_key_set_twice_is_refused(parser) -> None:
    with pytest.raises(ConfigError, match="both set draft_model, phrase_len"):
        parse(
            parser,
            "--ouroboros-config", '{"phrase_len": 4, "draft_model": "D", "window_size": 1}',
            "--additional-config", '{"ouroboros": {"phrase_len": 4, "draft_model": "E"}}',
        )  # fmt: skip


@pytest.mark.parametrize("value", ["[1]", "3", '"draft"'])
def test_the_flag_takes_an_object(parser, value) -> None:
    with pytest.raises(ConfigError, match="pass a JSON object"):
        parse(parser, "--ouroboros-config", value)


def test_the_flag_takes_json(parser, capsys) -> None:
    with pytest.raises(SystemExit):
        parse(parser, "--ouroboros-config", "{draft_model: D}")
    assert "--ouroboros-config" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["null", "3"])
def test_additional_config_of_another_shape(parser, other) -> None:
    """Null stands for no options, as everywhere; anything else is refused in our words."""
    arguments = (
        "--ouroboros-config", '{"draft_model": "D"}',
        "--additional-config", f'{{"ouroboros": {other}}}',
    )  # fmt: skip
    if other == "null":
        args = parse(parser, *arguments)
        assert args.additional_config == {"ouroboros": {"draft_model": "D"}}
    else:
        with pytest.raises(ConfigError, match="pass a JSON object"):
            parse(parser, *arguments)


# -- sampling parameters ---------------------------------------------------------------------------


UNUSUAL = ({"min_p": 0.1}, {"logit_bias": {1: 2.0}})


@pytest.mark.parametrize("params", UNUSUAL, ids=lambda p: next(iter(p)))
def test_our_engine_takes_what_vllm_refuses_beside_speculation(params) -> None:
    SamplingParams(**params)._validate_spec_decode(
        SimpleNamespace(method="custom_class", model=PROPOSER)
    )


@pytest.mark.parametrize("params", UNUSUAL, ids=lambda p: next(iter(p)))
def test_other_engines_refuse_it_as_ever(params) -> None:
    for method, model in (("ngram", PROPOSER), ("custom_class", "other.Proposer")):
        with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
            SamplingParams(**params)._validate_spec_decode(
                SimpleNamespace(method=method, model=model)
            )
    SamplingParams(**params)._validate_spec_decode(None)
    SamplingParams()._validate_spec_decode(SimpleNamespace(method="ngram", model=None))


def test_vllm_looks_through_the_modules_of_a_process_with_numba(monkeypatch) -> None:
    """A second engine of a process: vLLM reads the dict of whatever stands in a loaded module."""
    import numba  # noqa: F401
    from llvmlite.binding import ffi
    from vllm.platforms import current_platform
    from vllm.triton_utils import dispatcher

    seen = []
    monkeypatch.setattr(dispatcher, "_registry", {})
    monkeypatch.setattr(dispatcher, "_rebind_kernels", lambda _: seen.append(vars(ffi.lib)))
    current_platform.register_triton_kernel_overrides()
    assert seen == [{}]


def test_a_check_of_the_configuration_loads_no_compiled_loop() -> None:
    """vLLM's main process needs none, and vLLM looks through the loaded modules of a worker."""
    script = (
        "import sys; from vllm_ouroboros.integration import model_compat, patches, plugin; "
        "plugin.register(); assert model_compat.is_head('nowhere') is False; "
        "assert 'numba' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
