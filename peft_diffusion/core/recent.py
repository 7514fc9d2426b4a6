"""What was found out lately, kept for the next one who asks."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Results by what they depend on. Threads share it; what nobody asked for longest is given up first.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """Give a result.

        Args:
            key: What it depends on.

        Returns:
            The result; None where it is not known.
        """
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Keep a result.

        Args:
            key: What it depends on.
            value: The result.
        """
        with self._lock:
            self._known[key] = value
            self._known.move_to_end(key)
            if len(self._known) > self._most:
                self._known.popitem(last=False)

    def forget(self) -> None:
        """Give up all."""
        with self._lock:
            self._known.clear()
