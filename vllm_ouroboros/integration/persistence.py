"""What outlives an engine: its phrases and its costs, each in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_ouroboros.phrases.idle_save import IdleSave
from vllm_ouroboros.phrases.pool_file import PoolFile
from vllm_ouroboros.phrases.pool_format import PoolFormat, tokenizer_hash

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_ouroboros.phrases.pool import PhrasePool
    from vllm_ouroboros.policy.forward_costs import Costs

logger = init_logger(f"vllm.{__name__}")  # vLLM configures what is below "vllm"


def file_of(path: str | Path, model: ModelConfig) -> PoolFile:
    """The file of a model's phrases."""
    vocab = {model.model: 0}  # without a tokenizer the model's name stands for it
    if not model.skip_tokenizer_init:
        vocab = cached_tokenizer_from_config(model).get_vocab()
    return PoolFile(path, PoolFormat(model.get_vocab_size(), tokenizer_hash(vocab)))


class Persistence:
    """A pool in its file, and the costs beside it.

    Args:
        pool: is filled from the file.
        path: of the file.
        model: whose tokens the phrases are of.
    """

    def __init__(self, pool: PhrasePool, path: str, model: ModelConfig) -> None:
        self.pool, self.path = pool, path
        self.file = file_of(path, model)
        self.file.load(pool)
        self.costs: Costs | None = None
        self.idle_save = IdleSave(self._save)

    def save_if_due(self) -> None:
        """Save the pool now and then, while the engine goes on, and take in what others saved."""
        self.file.take_in(self.pool)
        if self.file.due():
            self.file.save_in_background(self.pool)

    def start_over(self) -> None:
        """Let the next save forget what the file has."""
        self.file.start_over()

    def close(self) -> None:
        """Save for the last time."""
        self.idle_save.busy()
        self.file.close(self.pool)
        self._save_costs()

    def _save(self) -> None:
        self.file.save_in_background(self.pool)
        self._save_costs()

    def _save_costs(self) -> None:
        if self.costs is not None:
            try:
                self.costs.save(self.path)
            except OSError as error:
                logger.warning("The costs of this engine are not saved: %s", error)
