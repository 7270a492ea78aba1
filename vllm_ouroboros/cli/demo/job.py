"""What the demo's two engines generate, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_ouroboros.cli.demo.engine import EngineJob
from vllm_ouroboros.cli.inputs import DRAFT, TARGET, InputError, model_reference, shipped_prompts


@dataclass(frozen=True)
class Job:
    """What both engines generate."""

    model: str
    draft_model: str | None
    prompts: tuple[tuple[str, str], ...]  # (id, text)
    max_tokens: int
    dtype: str
    rounds: int

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
    ) -> Job:
        """A job from the command line's options; None means the shipped one.

        Raises:
            InputError: a file is missing or an option makes no sense.
        """
        if draft_model is None:
            draft_model = str(DRAFT) if model is None else "none"
        return cls(
            model=model_reference(str(TARGET) if model is None else model, "--model"),
            draft_model=None
            if draft_model == "none"
            else model_reference(draft_model, "--draft-model"),
            prompts=_given(prompts) if prompts else shipped_prompts(),
            max_tokens=max_tokens,
            dtype=dtype,
            rounds=rounds,
        )

    def engine(self, *, ouroboros: bool) -> EngineJob:
        """The part of one engine."""
        return EngineJob(
            model=self.model,
            ouroboros={"draft_model": self.draft_model} if ouroboros else None,
            prompts=tuple(text for _, text in self.prompts),
            max_tokens=self.max_tokens,
            dtype=self.dtype,
        )


def _given(prompts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    for prompt in prompts:
        if not prompt.strip():
            raise InputError(f"--prompt {prompt!r}: is empty")
    return tuple((f"prompt {i}", prompt) for i, prompt in enumerate(prompts, 1))
