"""Training text of draft heads: conversations that the target writes itself, through vLLM."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pair_data import PairError
from pair_samples import Samples

from vllm_ouroboros.cli.loops import loops

if TYPE_CHECKING:
    from vllm import LLM

HASHED_TOKENS = 64
MARK = "\ue000"  # stands for a turn's text in a rendered template
FEWEST_ANSWER_TOKENS = 8


class Chat:
    """The pieces of a chat template between which turns stand, as token ids.

    Raises:
        PairError: the template does not hold a turn's text as it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        turns = [{"role": "user", "content": MARK}]
        first = _rendered(tokenizer, turns)
        answered = [*turns, {"role": "assistant", "content": MARK}]
        second = _rendered(tokenizer, [*answered, turns[0]])
        if first.count(MARK) != 1 or second.count(MARK) != 3:
            raise PairError("--target: its chat template changes the text of a turn")
        before, after = first.split(MARK)
        self.opening = self.encode(before)  # what stands before a first user turn
        self.reply = self.encode(after)  # between a user turn and its answer
        self.next = self.encode(second.split(MARK)[2])  # between an answer and the next turn


def _rendered(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def write_conversations(
    llm: LLM,
    path: Path,
    *,
    minutes: float,
    batch: int,
    answer_tokens: int,
    turns: Sequence[str],
    follow_up: float,
    own: float,
) -> None:
    """Append conversations to a file of JSON lines, a batch at a time.

    The target writes the user's turn after the bare template (arXiv 2406.08464) at temperature 1,
    then answers it greedily. A share of the conversations gets a second turn.

    Args:
        llm: the target.
        path: lines ``{"prompt": ids, "answer": ids}``.
        minutes: after which no new batch begins.
        batch: conversations at a time.
        answer_tokens: most tokens of an answer.
        turns: user turns to be answered too; those that the file holds already are left out.
        follow_up: share of conversations that go on.
        own: share of the batches whose user turns the target writes, while there are others.
    """
    chat = Chat(llm.get_tokenizer())
    known = {tuple(prompt) for prompt, _ in texts(path)} if path.exists() else set()
    given = [[*chat.opening, *chat.encode(text), *chat.reply] for text in dict.fromkeys(turns)]
    given = [prompt for prompt in given if tuple(prompt) not in known]
    start = time.monotonic()
    owed = 0.0  # batches that the target has still to begin itself
    while time.monotonic() - start < minutes * 60:
        owed += own
        if owed >= 1 or not given:
            asked, owed = _user_turns(llm, chat, [chat.opening] * batch), owed - 1
        else:
            asked, given = given[:batch], given[batch:]
        answers = _answers(llm, asked, answer_tokens)
        _append(path, asked, answers)
        longer = [
            [*prompt, *_without_end(llm, answer), *chat.next]
            for prompt, answer in zip(asked, answers, strict=True)
            if len(prompt) + len(answer) < 400 and not loops(answer)
        ][: int(len(asked) * follow_up)]
        if longer:
            asked = _user_turns(llm, chat, longer)
            _append(path, asked, _answers(llm, asked, answer_tokens))


def write_continuations(
    llm: LLM, path: Path, beginnings: Sequence[str], *, batch: int, answer_tokens: int
) -> None:
    """Append what a target without a chat template says after each text, greedily.

    Texts that the file holds already are left out.
    """
    tokenizer = llm.get_tokenizer()
    known = {tuple(prompt) for prompt, _ in texts(path)} if path.exists() else set()
    prompts = [tokenizer.encode(text) for text in dict.fromkeys(beginnings)]
    prompts = [prompt for prompt in prompts if tuple(prompt) not in known]
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        _append(path, some, _answers(llm, some, answer_tokens))


def _user_turns(llm: LLM, chat: Chat, openings: Sequence[Sequence[int]]) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=160)
    outputs = _generate(llm, openings, params)
    return [
        [*opening, *_without_end(llm, output.token_ids), *chat.reply]
        for opening, output in zip(openings, outputs, strict=True)
        if output.finish_reason == "stop"
    ]


def _answers(llm: LLM, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=most)
    return [list(output.token_ids) for output in _generate(llm, prompts, params)]


def _generate(llm: LLM, prompts: Sequence[Sequence[int]], params: Any) -> list[Any]:
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [one.outputs[0] for one in llm.generate(inputs, params, use_tqdm=False)]


def _without_end(llm: LLM, tokens: Sequence[int]) -> list[int]:
    end = llm.get_tokenizer().eos_token_id
    return [token for token in tokens if token != end]


def _append(path: Path, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
    with path.open("a") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            file.write(json.dumps({"prompt": list(prompt), "answer": list(answer)}) + "\n")


def split(path: Path, max_tokens: int, share: int) -> tuple[Samples, Samples]:
    """Training and held-out texts of a file of conversations; repeats and loops are left out.

    Args:
        path: the file.
        max_tokens: longer texts are cut.
        share: one conversation in so many is held out.
    """
    kept: tuple[list[list[int]], list[list[int]]] = ([], [])
    lengths: tuple[list[int], list[int]] = ([], [])
    for prompt, answer in texts(path):
        row = [*prompt, *answer][:max_tokens]
        if len(answer) < FEWEST_ANSWER_TOKENS or len(prompt) + FEWEST_ANSWER_TOKENS > max_tokens:
            continue
        if loops(answer):
            continue
        first = json.dumps(prompt[:HASHED_TOKENS]).encode()  # the same in later turns
        held = int(hashlib.sha256(first).hexdigest(), 16) % share == 0
        kept[held].append(row)
        lengths[held].append(len(prompt))
    if not kept[0] or not kept[1]:
        raise PairError(f"--work: {path} holds {len(kept[0])} texts that can be used; write more")
    training, held_out = (
        Samples.from_lists(rows, n) for rows, n in zip(kept, lengths, strict=True)
    )
    return training, held_out


def texts(path: Path) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and answers of a file of conversations, as token ids; each prompt once."""
    seen = set()
    with path.open() as file:
        for line in file:
            one = json.loads(line)
            key = tuple(one["prompt"])
            if key not in seen:
                seen.add(key)
                yield one["prompt"], one["answer"]
