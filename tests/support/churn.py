"""Registering and deleting adapters while something happens to the servers."""

from __future__ import annotations

import itertools
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from loraplex import Client, LoraplexError, NotFoundError

_PAUSE_S: Final = 0.3
#: Few enough that metrics name each of them.
_NUM_NAMES: Final = 10


class Churn:
    """Adapters that come and go through a proxy, until told that it is over.

    Attributes:
        kept: names that the server said it has.
        failures: calls that broke off, by the name they were about: they may have been done.
    """

    def __init__(self, client: Client, folder: Path) -> None:
        self.kept: set[str] = set()
        self.failures: dict[str, LoraplexError] = {}
        self._is_over = threading.Event()
        self._client, self._folder = client, folder

    def run(self) -> None:
        """Push adapters, and delete every other one, in a thread of its own."""
        for number in itertools.count():
            if self._is_over.wait(_PAUSE_S):
                return
            name = f"new-{number % _NUM_NAMES}"
            try:
                self._client.adapters.push(self._folder, name=name)
                if number % 2:
                    self._client.adapters.delete(name)
                else:
                    self.kept.add(name)
            except LoraplexError as error:
                self.failures[name] = error

    def stop(self) -> None:
        """Let `run` return after what it is at."""
        self._is_over.set()

    def clear(self) -> None:
        """Delete what is left."""
        for name in [*self.kept, *self.failures]:
            with suppress(NotFoundError):
                self._client.adapters.delete(name)
