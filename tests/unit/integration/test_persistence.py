"""What outlives an engine, and what engines on one path learn from each other."""

from __future__ import annotations

from types import SimpleNamespace

from vllm_ouroboros.integration.persistence import Persistence
from vllm_ouroboros.phrases import pool_file
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool

MODEL = SimpleNamespace(model="tiny", skip_tokenizer_init=True, get_vocab_size=lambda: 50)


def engine(path) -> Persistence:
    return Persistence(PhrasePool(64, 3, 4), str(path), MODEL)


def test_engines_on_one_path_take_in_what_others_save(path, monkeypatch) -> None:
    """As their steps go by."""
    monkeypatch.setattr(pool_file, "SAVE_INTERVAL_S", 0.0)
    engines = [engine(path), engine(path)]
    for number, one in enumerate(engines):
        one.pool.insert(7, [number], PhraseSource.PROMPT)
    for _ in range(4):
        for one in engines:
            one.save_if_due()
            one.file._wait()
    assert [set(one.pool.lookup(7)) for one in engines] == [{(0,), (1,)}] * 2
    for one in engines:
        one.close()
    assert set(engine(path).pool.lookup(7)) == {(0,), (1,)}


def test_a_fresh_start_is_of_the_file_too(path) -> None:
    one = engine(path)
    one.pool.insert(7, [1], PhraseSource.PROMPT)
    one.close()
    one.pool.clear()
    one.start_over()
    one.pool.insert(8, [2], PhraseSource.PROMPT)
    one.close()
    again = engine(path).pool
    assert (again.lookup(7), again.lookup(8)) == ([], [(2,)])
