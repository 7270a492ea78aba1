"""What the demo's two engines generate, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_ouroboros.cli.demo.engine import EngineJob
from vllm_ouroboros.cli.inputs import DRAFT, TARGET, InputError, model_reference, shipped_prompts
from vllm_ouroboros.cli.tasks import has_chat_template, one_of_each, read_tasks

EDITS = 4
"""Shipped edits of files that a demo with predictions shows."""


@dataclass(frozen=True)
class Job:
    """What both engines generate.

    Attributes:
        prompts: ids and texts.
        chat: whether a prompt is what a user says to a chat model, or a text to continue.
        predictions: texts that Ouroboros is told to expect, one a prompt; empty for none.
    """

    model: str
    draft_model: str | None
    prompts: tuple[tuple[str, str], ...]
    max_tokens: int
    dtype: str
    rounds: int
    chat: bool = False
    predictions: tuple[str, ...] = ()

    @classmethod
    def checked(
        cls,
        *,
        model: str | None,
        draft_model: str | None,
        prompts: Sequence[str] | None,
        max_tokens: int,
        dtype: str,
        rounds: int,
        chat: bool | None = None,
        prediction: bool = False,
    ) -> Job:
        """A job from the command line's options; None means the shipped one.

        A model with a chat template chats, unless ``chat`` says otherwise. Without ``prompts`` it
        gets one of each task; other models get the shipped functions to continue. With a
        ``prediction`` prompts are to edit the code block in them, and shipped ones do.

        Raises:
            InputError: a file is missing or an option makes no sense.
        """
        if draft_model is None:
            draft_model = str(DRAFT) if model is None else "none"
        target = model_reference(str(TARGET) if model is None else model, "--model")
        chat = has_chat_template(target) if chat is None else chat
        shown = _one_of_each_task if chat else shipped_prompts
        if prediction:
            shown = _edits
        texts = _given(prompts) if prompts else shown()
        return cls(
            model=target,
            draft_model=None
            if draft_model == "none"
            else model_reference(draft_model, "--draft-model"),
            prompts=texts,
            max_tokens=max_tokens,
            dtype=dtype,
            rounds=rounds,
            chat=chat,
            predictions=tuple(_code_block(text) for _, text in texts) if prediction else (),
        )

    def engine(self, *, ouroboros: bool) -> EngineJob:
        """The part of one engine."""
        return EngineJob(
            model=self.model,
            ouroboros={"draft_model": self.draft_model} if ouroboros else None,
            prompts=tuple(text for _, text in self.prompts),
            max_tokens=self.max_tokens,
            dtype=self.dtype,
            chat=self.chat,
            predictions=self.predictions if ouroboros else (),
        )


def _given(prompts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    for prompt in prompts:
        if not prompt.strip():
            raise InputError(f"--prompt {prompt!r}: is empty")
    return tuple((f"prompt {i}", prompt) for i, prompt in enumerate(prompts, 1))


def _code_block(prompt: str) -> str:
    """The code block of a prompt."""
    found = re.search(r"^```[^\n]*\n(.*?)^```", prompt, re.MULTILINE | re.DOTALL)
    if found is None:
        raise InputError(
            f"--prompt {prompt[:40]!r}: has no code block (lines between ```), which --prediction "
            "expects to be repeated"
        )
    return found[1]


def _edits() -> tuple[tuple[str, str], ...]:
    edits = [one for one in read_tasks() if one.task == "edit"]
    return tuple((one.id, one.turns[0]) for one in edits[:EDITS])


def _one_of_each_task() -> tuple[tuple[str, str], ...]:
    return tuple((one.task, one.turns[0]) for one in one_of_each(read_tasks()))
