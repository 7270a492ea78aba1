"""Servers of the benchmark, with stand-ins for vLLM's server and client."""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ouroboros.cli import engine_process
from vllm_ouroboros.cli.bench import serve as bench_serve
from vllm_ouroboros.cli.bench.engine import EngineSpec, RunResult
from vllm_ouroboros.cli.engine_process import EngineError
from vllm_ouroboros.config import PROPOSER

SPEC = EngineSpec("m", "auto", None, None, 64, 4, 2048, False)


def test_commands_of_server_and_client(tmp_path: Path) -> None:
    speculative = {"model": PROPOSER, "num_speculative_tokens": 26}
    spec = EngineSpec("m", "auto", speculative, {"draft_model": "d"}, 4096, 4, 2048, True)
    command = bench_serve.server_command(spec, 1234)
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    options = dict(pairwise(command))
    assert json.loads(options["--speculative-config"]) == speculative
    assert json.loads(options["--ouroboros-config"]) == {"draft_model": "d"}
    assert options["--max-num-batched-tokens"] == "4096"
    assert "--enforce-eager" in command
    assert "--speculative-config" not in bench_serve.server_command(SPEC, 1)
    assert "--tensor-parallel-size 1" in " ".join(bench_serve.server_command(SPEC, 1))
    client = bench_serve.client_command("m", "http://h", tmp_path / "p.jsonl", 3, 8, 0.5)
    options = dict(pairwise(client))
    assert options["--request-rate"] == "0.5"
    assert options["--result-dir"] == str(tmp_path)


def test_what_the_client_found() -> None:
    found: dict[str, Any] = {
        "errors": ["", ""], "completed": 2, "output_lens": [5, 1], "duration": 3.0,
        "latencies": [2.5, 0.5], "ttfts": [0.5, 0.5], "generated_texts": ["abc", "d"],
        "spec_decode_num_drafts": 2, "spec_decode_draft_tokens": 6,
        "spec_decode_accepted_tokens": 4,
    }  # fmt: skip
    result = bench_serve.read_result(found, 2)
    assert result == RunResult(
        [(6, 3.0)], ["abc", "d"], [0.5, 0.5], [0.5, None],
        {"drafts": 2, "draft_nodes": 6, "accepted": 4},
    )  # fmt: skip
    with pytest.raises(EngineError, match="1 of 2 requests failed: ValueError: no"):
        bench_serve.read_result(found | {"completed": 1, "errors": ["", "a\nValueError: no"]}, 2)


SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open("asked", "a") as file: file.write(body["prompt"] + "\\n")
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
CLIENT = """
import json, sys
prompts = [json.loads(line)["prompt"] for line in open("prompts.jsonl")]
n = len(prompts)
asked = open("asked").read().splitlines()
json.dump({"errors": [""] * n, "completed": n, "output_lens": [2] * n, "duration": 1.0,
    "latencies": [1.0] * n, "ttfts": [0.5] * n, "generated_texts": [*prompts, asked[-1]]},
    open("result.json", "w"))
"""


def measure(monkeypatch: pytest.MonkeyPatch, server: str, client: str) -> Any:
    monkeypatch.setattr(
        bench_serve, "server_command", lambda _, port: [sys.executable, "-c", server, str(port)]
    )
    monkeypatch.setattr(
        bench_serve, "client_command", lambda *_: [sys.executable, "-c", client]
    )  # fmt: skip
    return bench_serve.measure(
        SPEC, prompts=["a", "b"], others=["x"], rate=1.0, max_tokens=8, ignore_eos=True,
        timeout=20, verbose=False,
    )  # fmt: skip


def test_a_server_from_start_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    result, peak = measure(monkeypatch, SERVER, CLIENT)
    assert result.groups == [(4, 1.0)]
    assert result.outputs == ["a", "b", "x"]  # the last is what the server was asked last
    assert peak > 2**20
    for pid in engine_process.group_members(os.getpgrp()):
        assert SERVER[:40] not in Path(f"/proc/{pid}/cmdline").read_text()


def test_conversations_are_sent_in_the_models_template(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return "<s>" + "".join(f"{m['role']}: {m['content']};" for m in messages)

    loaded = SimpleNamespace(from_pretrained=lambda _: Tokenizer())
    monkeypatch.setattr("transformers.AutoTokenizer", loaded)
    chat = (("user", "hi"), ("assistant", "ho"), ("user", "on"))
    assert bench_serve.as_texts("m", ["plain", chat]) == [
        "plain", "<s>user: hi;assistant: ho;user: on;",
    ]  # fmt: skip
    seen: list[list[str]] = []
    monkeypatch.setattr(bench_serve, "_run_client", lambda command, *_: seen.append(command))
    monkeypatch.setattr(
        bench_serve, "server_command", lambda _, port: [sys.executable, "-c", SERVER, str(port)]
    )
    for prompt, given in ((chat, True), ("plain", False)):
        with pytest.raises(EngineError, match="FileNotFoundError"):  # this client finds nothing
            bench_serve.measure(
                SPEC, prompts=[prompt], others=[], rate=1.0, max_tokens=8, ignore_eos=False,
                timeout=20, verbose=False,
            )  # fmt: skip
        assert ('{"add_special_tokens": false}' in seen[-1]) == given, "the template has them"


@pytest.mark.parametrize(
    ("server", "client", "message"),
    [
        ("raise ValueError('no port')", CLIENT, "server: ValueError: no port"),
        (SERVER, "raise ValueError('no pandas')", "vllm bench serve: ValueError: no pandas"),
        (SERVER, "pass", "server: FileNotFoundError"),
    ],
)
def test_servers_that_fail(
    monkeypatch: pytest.MonkeyPatch, server: str, client: str, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        measure(monkeypatch, server, client)
