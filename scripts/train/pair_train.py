"""The training loop of the tiny pair: optimizers, schedule, checkpoints and progress."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

Step = tuple[Tensor, int]  # loss to differentiate, tokens it was computed from
NextStep = Callable[[], Step]
CHECKPOINT_SECONDS = 120
WARMUP_STEPS = 30


@dataclass(frozen=True)
class Settings:
    """How one stage is trained; learning rates decay linearly to zero, by time or by steps."""

    name: str
    minutes: float
    batch_tokens: int = 4096
    rate: float = 2e-3  # Muon, for the matrices inside the layers; AdamW has half of it
    max_steps: int | None = None
    seed: int = 0
    detail: str = ""  # for the model card

    @property
    def steps(self) -> float:
        """After which it ends, whatever the time."""
        return math.inf if self.max_steps is None else max(1, self.max_steps)


@dataclass
class Record:
    """What one stage did, for the model card."""

    name: str
    detail: str = ""
    minutes: float = 0.0  # wall clock
    steps: int = 0
    tokens: int = 0
    train_loss: float = 0.0  # running mean, nats per token
    validation_before: float = 0.0
    validation_after: float = 0.0


class Optimizer:
    """Muon for the layers' matrices and AdamW for everything else, with one schedule."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        matrices = [p for p in model.layers.parameters() if p.dim() == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, settings.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, settings.rate / 2, betas=(0.9, 0.95), weight_decay=0.01),
        ]
        self._parameters = [*matrices, *rest]
        self._peaks = [settings.rate, settings.rate / 2]

    def clip(self) -> None:
        """Keep the gradients small."""
        nn.utils.clip_grad_norm_(self._parameters, 1.0)

    def step(self, scale: float) -> None:
        self.clip()
        for part, peak in zip(self.parts, self._peaks, strict=True):
            part.param_groups[0]["lr"] = peak * scale
            part.step()
            part.zero_grad(set_to_none=True)


class AdamW(Optimizer):
    """AdamW alone, gradients clipped by value, as draft heads are trained in the papers."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._parameters = [*model.parameters()]
        self._peaks = [settings.rate]
        self.parts = [
            torch.optim.AdamW(self._parameters, settings.rate, betas=(0.9, 0.95), weight_decay=0.01)
        ]

    def clip(self) -> None:
        nn.utils.clip_grad_value_(self._parameters, 0.5)


def train(
    model: nn.Module,
    settings: Settings,
    next_step: NextStep,
    validate: Callable[[], float],
    work: Path,
    optimizer_class: type[Optimizer] = Optimizer,
) -> Record:
    """Runs one stage within its time budget, resuming from its checkpoint in `work`."""
    optimizer = optimizer_class(model, settings)
    checkpoint = work / f"{settings.name}.checkpoint.pt"
    record = Record(settings.name, settings.detail)
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        for part, state in zip(optimizer.parts, saved["optimizers"], strict=True):
            part.load_state_dict(state)
        record = Record(**saved["record"])
    else:
        record.validation_before = validate()
    earlier, start = record.minutes, time.monotonic()
    last_save = start
    with _progress(settings.name) as (update, log):
        while record.minutes < settings.minutes and record.steps != settings.max_steps:
            loss, tokens = next_step()
            loss.backward()
            decay = 1 - max(record.minutes / settings.minutes, record.steps / settings.steps)
            optimizer.step(min(decay, (record.steps + 1) / WARMUP_STEPS))
            now = time.monotonic()
            record.minutes = earlier + (now - start) / 60
            record.steps += 1
            record.tokens += tokens
            weight = max(1 / record.steps, 0.01)
            record.train_loss += weight * (loss.item() - record.train_loss)
            update(record, settings)
            if now - last_save > CHECKPOINT_SECONDS:
                last_save = now
                _save(checkpoint, model, optimizer, record)
                log(f"{json.dumps(asdict(record))} validation {validate():.4f}")
    record.validation_after = validate()
    torch.save(model.state_dict(), work / f"{settings.name}.pt")
    with (work / "stages.jsonl").open("a") as history:
        history.write(json.dumps(asdict(record)) + "\n")
    checkpoint.unlink(missing_ok=True)
    return record


def _save(path: Path, model: nn.Module, optimizer: Optimizer, record: Record) -> None:
    partial = path.with_suffix(".part")
    states = [part.state_dict() for part in optimizer.parts]
    torch.save(
        {"model": model.state_dict(), "optimizers": states, "record": asdict(record)}, partial
    )
    partial.replace(path)


class _progress:
    """Progress bar over a stage's time budget: context manager giving update and log functions."""

    def __init__(self, name: str) -> None:
        self._bar = Progress(
            TextColumn(name), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
        )
        self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> tuple[Callable[[Record, Settings], None], Callable[[str], None]]:
        self._bar.start()
        return self._update, self._bar.console.print

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _update(self, record: Record, settings: Settings) -> None:
        rate = record.tokens / max(record.minutes * 60, 1e-9)
        text = f"step {record.steps}  loss {record.train_loss:.3f}  {rate:,.0f} tokens/s"
        self._bar.update(self._task, completed=record.minutes / settings.minutes, description=text)
