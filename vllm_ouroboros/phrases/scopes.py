"""Who shares phrases with whom."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from vllm_ouroboros.phrases.pool import PhrasePool


class Scopes:
    """Numbers for those who share phrases; 0 is everybody's, and no other is ever used twice.

    Args:
        pool: is emptied should the numbers run out (2^31 of them).
        names: how many are remembered; who was forgotten starts with no phrases.
    """

    LAST = 2**31 - 1

    def __init__(self, pool: PhrasePool, names: int = 2**16) -> None:
        self._pool, self._limit, self._next = pool, names, 1
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()

    def new(self) -> int:
        """A number that nobody else has."""
        if self._next > self.LAST:
            self._pool.clear()
            self._numbers.clear()
            self._next = 1
        self._next += 1
        return self._next - 1

    def of(self, name: Hashable) -> int:
        """The number of a name, the same each time."""
        if name not in self._numbers:
            number = self.new()
            self._numbers[name] = number
            if len(self._numbers) > self._limit:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(name)
        return self._numbers[name]
