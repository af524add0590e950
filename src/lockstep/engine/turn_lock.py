"""A lock that is handed on in the order in which it was asked for."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class TurnLock:
    """Who releases it and asks again waits behind everybody who asked before. Not reentrant.

    A plain lock would go to a thread that takes it again at once, time after time, while others wake up too late.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_held = False
        self._turns: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._turns.append(turn)
        try:
            turn.acquire()  # until whoever holds the lock hands it over
        except BaseException:
            self._leave(turn)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            if self._turns:
                self._turns.popleft().release()
            else:
                self._is_held = False

    def _leave(self, turn: threading.Lock) -> None:
        """Whoever is interrupted while waiting gives the turn up, or on, if it came meanwhile."""
        with self._guard:
            if turn in self._turns:
                self._turns.remove(turn)
                return
        self.__exit__(None, None, None)
