"""Every vLLM symbol that the plugin replaces: all of them pass through unless we are selected, but
for `one_rank`, which replaces one for the time of a block.

The rest of the integration goes by vLLM's own extension points: ``worker_cls``, ``scheduler_cls``,
the attention backend registry and the custom proposer.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm_ouroboros.config import KEY, ConfigError, is_ours, is_selected
from vllm_ouroboros.integration.compat import SCHEDULER, check_engine, choose_attention, worker
from vllm_ouroboros.integration.request_options import sendable


@dataclass(frozen=True)
class Patch:
    """One replaced symbol.

    Attributes:
        owner: returns the class that holds the symbol.
        name: the symbol.
        wrap: makes the replacement from the original descriptor.
        why: what breaks without it.
        upstream: the symbol in vLLM 0.32.
        remove_when: what would make it unnecessary.
    """

    owner: Callable[[], type]
    name: str
    wrap: Callable[[Any], Any]
    why: str
    upstream: str
    remove_when: str

    def apply(self) -> None:
        """Install the replacement; refuses to wrap itself."""
        owner = self.owner()
        original = owner.__dict__.get(self.name) or _inherited(owner, self.name)
        if getattr(_function(original), "_ouroboros", False):
            raise RuntimeError(f"{self.upstream} is patched already")
        replacement = self.wrap(original)
        _function(replacement)._ouroboros = True
        setattr(owner, self.name, replacement)


def _inherited(owner: type, name: str) -> Any:
    return next(base.__dict__[name] for base in owner.__mro__ if name in base.__dict__)


def _function(descriptor: Any) -> Any:
    return getattr(descriptor, "__func__", descriptor)


def _platform() -> type:
    from vllm.platforms import current_platform

    return type(current_platform)


def _engine_args() -> type:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs


def _wrap_check(original: Any) -> Any:
    function = _function(original)

    @functools.wraps(function)
    def check_and_update_config(cls, vllm_config) -> None:
        if is_selected(vllm_config) and vllm_config.parallel_config.worker_cls != worker():
            problems = check_engine(vllm_config)
            if problems:
                raise ConfigError("; ".join(problems))
            vllm_config.parallel_config.worker_cls = worker()
            vllm_config.scheduler_config.scheduler_cls = SCHEDULER
            choose_attention(vllm_config)
        function(cls, vllm_config)

    return classmethod(check_and_update_config)


def _wrap_add_cli_args(original: Any) -> Any:
    function = _function(original)

    @functools.wraps(function)
    def add_cli_args(parser):
        parser = function(parser)
        group = parser.add_argument_group("Ouroboros", "Speculative decoding by vllm-ouroboros")
        group.add_argument(
            "--speculative-model", dest="spec_model", help="The same as --spec-model."
        )
        group.add_argument(
            "--ouroboros-config",
            type=json.loads,
            default=None,
            help="Options of Ouroboros as JSON; merged into --additional-config.",
        )
        return parser

    return staticmethod(add_cli_args)


def _wrap_from_cli_args(original: Any) -> Any:
    function = _function(original)

    @functools.wraps(function)
    def from_cli_args(cls, args):
        options = getattr(args, "ouroboros_config", None)
        if options is not None:
            additional = dict(args.additional_config or {})
            known = additional.get("ouroboros") or {}
            for flag, value in (("--ouroboros-config", options), ("additional_config", known)):
                if not isinstance(value, dict):
                    raise ConfigError(f"{flag} holds {value!r} for Ouroboros: pass a JSON object")
            twice = sorted(options.keys() & known.keys())
            if twice:
                raise ConfigError(
                    f"--ouroboros-config and --additional-config both set {', '.join(twice)}: "
                    "set each key once"
                )
            additional["ouroboros"] = {**known, **options}
            args.additional_config = additional
        return function(cls, args)

    return classmethod(from_cli_args)


def _sampling_params() -> type:
    from vllm import SamplingParams

    return SamplingParams


def _wrap_validate_spec_decode(original: Any) -> Any:
    @functools.wraps(original)
    def _validate_spec_decode(self, speculative_config) -> None:
        if not is_ours(speculative_config):
            original(self, speculative_config)

    return _validate_spec_decode


def _stat_loggers() -> type:
    from vllm.v1.metrics.loggers import StatLoggerManager

    return StatLoggerManager


def _wrap_stat_loggers(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self, vllm_config, engine_idxs=None, custom_stat_loggers=None, *args, **kwargs):
        if is_selected(vllm_config):
            from vllm_ouroboros.integration.stat_logger import stat_logger

            own = stat_logger(custom_stat_loggers, alone=kwargs.get("client_count", 1) == 1)
            custom_stat_loggers = [own, *(custom_stat_loggers or [])]
        original(self, vllm_config, engine_idxs, custom_stat_loggers, *args, **kwargs)

    return __init__


def _input_processor() -> type:
    from vllm.v1.engine.input_processor import InputProcessor

    return InputProcessor


def _wrap_process_inputs(original: Any) -> Any:
    @functools.wraps(original)
    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        known = getattr(params, "extra_args", None)
        if not known or KEY not in known or not is_selected(self.vllm_config):
            return original(self, request_id, prompt, params, *args, **kwargs)
        chosen = sendable(known, self)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        own = request.sampling_params  # a copy of the caller's
        own.extra_args = {**own.extra_args, **chosen}
        return request

    return process_inputs


def _wrap_kernel_overrides(original: Any) -> Any:
    function = _function(original)

    @functools.wraps(function)
    def register_triton_kernel_overrides(cls) -> None:
        ffi = sys.modules.get("llvmlite.binding.ffi")  # numba's; there once numba was imported
        functions = getattr(getattr(ffi, "lib", None), "_fntab", None)
        if functions is not None:
            functions.setdefault("__dict__", {})
        function(cls)

    return classmethod(register_triton_kernel_overrides)


PATCHES = (
    Patch(
        owner=_platform,
        name="check_and_update_config",
        wrap=_wrap_check,
        why="choose worker, scheduler and attention, and refuse what cannot work, without flags",
        upstream="vllm.platforms.<current>.check_and_update_config",
        remove_when="a custom proposer can name its worker, scheduler and attention backends",
    ),
    Patch(
        owner=_engine_args,
        name="add_cli_args",
        wrap=_wrap_add_cli_args,
        why="the flags --speculative-model and --ouroboros-config",
        upstream="vllm.engine.arg_utils.EngineArgs.add_cli_args",
        remove_when="general plugins can register flags",
    ),
    Patch(
        owner=_engine_args,
        name="from_cli_args",
        wrap=_wrap_from_cli_args,
        why="--ouroboros-config becomes a part of additional_config",
        upstream="vllm.engine.arg_utils.EngineArgs.from_cli_args",
        remove_when="general plugins can register flags",
    ),
    Patch(
        owner=_sampling_params,
        name="_validate_spec_decode",
        wrap=_wrap_validate_spec_decode,
        why="min_p and logit_bias, which vLLM refuses with any speculative decoding",
        upstream="vllm.sampling_params.SamplingParams._validate_spec_decode",
        remove_when="vLLM asks the proposer what it can do",
    ),
    Patch(
        owner=_input_processor,
        name="process_inputs",
        wrap=_wrap_process_inputs,
        why="a request's options are checked, and a prediction becomes tokens, where a wrong one "
        "is an answer of the server and not an error in the engine",
        upstream="vllm.v1.engine.input_processor.InputProcessor.process_inputs",
        remove_when="vLLM asks plugins to check extra_args",
    ),
    Patch(
        owner=_stat_loggers,
        name="__init__",
        wrap=_wrap_stat_loggers,
        why="metrics and a line of the log for engines that run with us, and for no others",
        upstream="vllm.v1.metrics.loggers.StatLoggerManager.__init__",
        remove_when="a plugin of the group vllm.stat_logger_plugins can decline an engine: today "
        "one turns statistics on in every engine, also with --disable-log-stats",
    ),
    Patch(
        owner=_platform,
        name="register_triton_kernel_overrides",
        wrap=_wrap_kernel_overrides,
        why="a second engine of a process, or numba imported first: vLLM looks through all loaded "
        "modules, and llvmlite's library answers it with a function for any name, `__dict__` too",
        upstream="vllm.platforms.<current>.register_triton_kernel_overrides",
        remove_when="vLLM's scan of modules passes over objects without a dict of their own",
    ),
)

_applied = False


def apply_all() -> None:
    """Install every patch once; later calls do nothing."""
    global _applied
    if _applied:
        return
    for patch in PATCHES:
        patch.apply()
    _applied = True


@contextmanager
def one_rank() -> Iterator[None]:
    """A block in which layers of vLLM see a tensor-parallel group of this rank alone.

    They ask for the group when they are made and when they run, and take no other one.

    why: a small draft model that runs on the first rank needs no messages between ranks.
    upstream: `vllm.distributed.parallel_state._TP` in vLLM 0.32 and 0.33.
    remove-when: a model can be given its group.
    """
    from vllm.distributed import parallel_state

    group = parallel_state.get_tp_group()
    alone = copy.copy(group)
    alone.world_size, alone.rank_in_group, alone.ranks = 1, 0, [group.rank]
    parallel_state._TP = alone
    try:
        yield
    finally:
        parallel_state._TP = group
