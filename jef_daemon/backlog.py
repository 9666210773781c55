"""Back-pressure: how many queued jobs of each action we hold, and when its queue is left to others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping


class Backlog:
    """Counts queued jobs by action, and switches the deliveries of an action off and on.

    Off at the limit, on again at half of it, so that it does not flutter. Jobs that wait for a lock or a
    time are not counted: they would keep ready ones out.

    Args:
        limit: most queued jobs of one action.
        actions: those whose deliveries are switched.
        on_change: told an action and whether its deliveries are wanted.
    """

    def __init__(self, limit: int, actions: Iterable[str], on_change: Callable[[str, bool], None]) -> None:
        self._limit = limit
        self._resume_at = limit // 2
        self._on_change = on_change
        self._wanted = dict.fromkeys(actions, False)
        self._queued: Counter[str] = Counter()
        self._open = False

    def open(self, queued: Mapping[str, int]) -> None:
        """Begin: with what the ledger holds already."""
        self._open = True
        self._queued.update(queued)
        for action in self._wanted:
            self._switch(action)

    def change(self, limit: int, actions: Iterable[str], queued: Mapping[str, int]) -> None:
        """Have another limit and other actions.

        Args:
            limit: most queued jobs of one action.
            actions: those whose deliveries are switched; the deliveries of others end.
            queued: what the ledger holds of those that are new.
        """
        self._limit, self._resume_at = limit, limit // 2
        chosen = set(actions)
        for action in self._wanted.keys() - chosen:
            if self._wanted.pop(action):
                self._on_change(action, False)
            self.forget(action)
        for action in chosen - self._wanted.keys():
            self._wanted[action] = False
            self._queued[action] = queued.get(action, 0)
        for action in self._wanted:
            self._switch(action)

    def forget(self, action: str) -> None:
        """All queued jobs of an action were handed back."""
        self._queued.pop(action, None)

    def close(self) -> None:
        """Take nothing more in."""
        self._open = False

    def arrived(self, action: str, count: int) -> None:
        """Jobs were queued."""
        self._queued[action] += count
        self._switch(action)

    def left(self, action: str, count: int) -> None:
        """Jobs were started, or left the queue otherwise."""
        self._queued[action] -= count
        self._switch(action)

    @property
    def queued(self) -> Mapping[str, int]:
        """Queued jobs by action."""
        return self._queued

    def _switch(self, action: str) -> None:
        if not self._open or action not in self._wanted:
            return
        queued, wanted = self._queued[action], self._wanted[action]
        want = queued <= self._resume_at if not wanted else queued < self._limit
        if want != wanted:
            self._wanted[action] = want
            self._on_change(action, want)
