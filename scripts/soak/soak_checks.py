"""What is wrong with an answer, alone and beside vanilla's."""

from __future__ import annotations

from typing import Any

import httpx
from soak_answers import Answer, ask
from soak_requests import Request, violations

LOGPROB_TOLERANCE = 1e-4


def problems(request: Request, answer: Answer, expected: Answer | None) -> list[str]:
    """Everything that is wrong with an answer; ``expected`` is None without a reference."""
    if answer.get("left"):
        return [] if expected is None else _prefixes(answer, expected)
    if expected is not None and expected["status"] != 200:  # a request that vLLM refuses
        if expected["status"] // 100 == 4 == answer["status"] // 100:
            return []
        return [f"vanilla answered {expected['status']}: {expected.get('error')}"]
    if answer["status"] != 200:
        return [f"status {answer['status']}: {answer.get('error')}"]
    found = _malformed(request, answer)
    if expected is not None:
        if len(answer["choices"]) != len(expected["choices"]):
            return [*found, "the number of choices differs from vanilla's"]
        for ours, theirs in zip(answer["choices"], expected["choices"], strict=True):
            found += [f"choice {ours['index']}: {p}" for p in _differences(request, ours, theirs)]
    return found


def _malformed(request: Request, answer: Answer) -> list[str]:
    body, found = request.body, []
    choices, usage = answer["choices"], answer.get("usage") or {}
    if [choice["index"] for choice in choices] != list(range(body.get("n", 1))):
        found.append(f"{len(choices)} choices instead of {body.get('n', 1)}")
    for choice in choices:
        found += [f"choice {choice['index']}: {p}" for p in _malformed_choice(body, choice)]
    if found:
        return found
    prompt, total = len(choices[0]["prompt_token_ids"]), sum(len(c["token_ids"]) for c in choices)
    if (usage.get("prompt_tokens"), usage.get("completion_tokens")) != (prompt, total):
        found.append(f"usage says {usage}, there are {prompt} + {total} tokens")
    return found


def _malformed_choice(body: dict[str, Any], choice: dict[str, Any]) -> list[str]:
    found = []
    ids, text, reason = choice["token_ids"], choice["text"], choice.get("finish_reason")
    stopped_by = choice.get("stop_reason")
    if reason not in ("stop", "length"):
        found.append(f"finish_reason {reason!r}")
    if not body.get("min_tokens", 0) <= len(ids) <= body["max_tokens"]:
        found.append(f"{len(ids)} tokens")
    if reason == "length" and len(ids) != body["max_tokens"]:
        found.append(f"finish_reason 'length' after {len(ids)} tokens of {body['max_tokens']}")
    if body.get("ignore_eos") and reason == "stop" and stopped_by is None:
        found.append("the end of sequence was not ignored")
    allowed = body.get("allowed_token_ids")
    if allowed and not set(ids) <= set(allowed):
        found.append(f"tokens {sorted(set(ids) - set(allowed))} are not allowed")
    if isinstance(stopped_by, str) and not body.get("echo"):
        kept = body.get("include_stop_str_in_output", False)
        early = "min_tokens" in body  # may have stood there before it could stop the text
        if text.endswith(stopped_by) < kept or (stopped_by in text and not kept and not early):
            found.append(f"text with or without the stop string {stopped_by!r}: {text[-40:]!r}")
    if "structured_outputs" in body and reason == "stop" and not body.get("echo"):
        found += violations(body["structured_outputs"], text)
    prompt = len(choice.get("prompt_token_ids") or [])
    if "logprobs" in body:
        rows = (choice.get("logprobs") or {}).get("top_logprobs") or []
        echoed = prompt if body.get("echo") else 0
        if len(rows) != echoed + len(ids):
            found.append(f"{len(rows)} logprobs for {echoed} + {len(ids)} tokens")
        top = max(1, body["logprobs"])
        sizes = {len(row) for row in rows[echoed:]}
        if not sizes <= {top, top + 1}:
            found.append(f"{sorted(sizes)} logprobs a token")
    if "prompt_logprobs" in body and len(choice.get("prompt_logprobs") or []) != prompt:
        found.append(f"{len(choice.get('prompt_logprobs') or [])} prompt_logprobs for {prompt}")
    return found


def divergence(ours: list[int], theirs: list[int]) -> int | None:
    """First place where two texts choose differently."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return i
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _differences(request: Request, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    found = []
    a, b = ours["token_ids"], theirs["token_ids"]
    if request.body.get("stream") and isinstance(ours.get("stop_reason"), str):
        # vLLM streams the tokens of a step as they are, those behind a stop string as well
        a = a[: len(b)]
    at = divergence(a, b)
    if at is not None:
        found.append(f"token {at} is {a[at : at + 1]}, vanilla's {b[at : at + 1]}")
    found += [
        f"{key} {ours.get(key)!r}, vanilla's {theirs.get(key)!r}"
        for key in ("text", "finish_reason", "stop_reason", "prompt_token_ids")
        if ours.get(key) != theirs.get(key)
    ]
    if not found:
        for key, rows in (("logprobs", _rows), ("prompt_logprobs", _prompt_rows)):
            found += [f"{key} {p}" for p in _logprob_differences(rows(ours), rows(theirs))]
    return found


Row = dict[str, float] | None


def _rows(choice: dict[str, Any]) -> list[Row]:
    logprobs = choice.get("logprobs") or {}
    own = zip(logprobs.get("tokens", []), logprobs.get("token_logprobs", []), strict=True)
    rows = []
    for (token, value), top in zip(own, logprobs.get("top_logprobs", []), strict=True):
        rows.append(None if top is None else {**top, token: value})
    return rows


def _prompt_rows(choice: dict[str, Any]) -> list[Row]:
    return [
        None if row is None else {token: entry["logprob"] for token, entry in row.items()}
        for row in choice.get("prompt_logprobs") or []
    ]


def _logprob_differences(ours: list[Row], theirs: list[Row]) -> list[str]:
    """Where values differ; at the end of a top list, two that are alike may change places."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a is None or b is None:
            if a is not b:
                return [f"at {i} are {a}, vanilla's {b}"]
            continue
        pairs = [*zip(sorted(a.values()), sorted(b.values()), strict=False)]
        pairs += [(a[token], b[token]) for token in a.keys() & b.keys()]
        if len(a) != len(b) or any(abs(x - y) > LOGPROB_TOLERANCE for x, y in pairs):
            return [f"at {i} are {a}, vanilla's {b}"]
    return []


def _prefixes(answer: Answer, expected: Answer) -> list[str]:
    """What a client has seen before it left must begin vanilla's answer."""
    found = []
    whole = {choice["index"]: choice for choice in expected["choices"]}
    for choice in answer["choices"]:
        ids, wanted = choice["token_ids"], whole[choice["index"]]["token_ids"]
        at = divergence(ids, wanted[: len(ids)])
        stopped = isinstance(choice.get("stop_reason"), str)
        if at is not None and not (stopped and at == len(wanted)):
            found.append(
                f"choice {choice['index']}, before its client left: token {at} is "
                f"{ids[at : at + 1]}, vanilla's {wanted[at : at + 1]}"
            )
        elif not whole[choice["index"]]["text"].startswith(choice["text"]):
            found.append(f"choice {choice['index']}: {choice['text']!r} begins differently")
    return found


async def explain(
    client: httpx.AsyncClient, url: str, timeout: float, answer: Answer, expected: Answer
) -> list[str]:
    """What the model thinks of the tokens where texts leave vanilla's: how near a tie they were."""
    found = []
    for ours, theirs in zip(answer["choices"], expected["choices"], strict=False):
        a, b = ours["token_ids"], theirs["token_ids"]
        at = divergence(a, b)
        if at is None or at >= min(len(a), len(b)):
            continue
        body = {
            "prompt": theirs["prompt_token_ids"] + b[:at], "temperature": 0, "max_tokens": 1,
            "logprobs": 1, "logprob_token_ids": [a[at], b[at]],
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        told = await ask(client, url, Request(-2, body), timeout)
        if told["choices"]:
            top = told["choices"][0]["logprobs"]["top_logprobs"]
            found.append(f"choice {ours['index']}: raw logprobs {top}")
    return found
