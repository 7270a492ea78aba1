"""Work that waits for a forward."""

from __future__ import annotations

import pytest

from vllm_ouroboros.integration.deferred import Deferred


def test_calls_wait_and_keep_their_order() -> None:
    done: list[str] = []
    deferred = Deferred(waits=True)
    deferred.call(done.append, "one")
    deferred.call(done.append, "two")
    assert (done, len(deferred)) == ([], 2)
    deferred.catch_up()
    assert (done, len(deferred)) == (["one", "two"], 0)
    deferred.catch_up()
    assert done == ["one", "two"]


def test_nothing_waits_where_that_gains_nothing() -> None:
    done: list[str] = []
    deferred = Deferred()
    deferred.call(done.append, "one")
    assert (done, len(deferred)) == (["one"], 0)


def test_a_call_that_fails_is_not_made_again() -> None:
    deferred = Deferred(waits=True)
    deferred.call(int, "no number")
    with pytest.raises(ValueError, match="no number"):
        deferred.catch_up()
    deferred.catch_up()
