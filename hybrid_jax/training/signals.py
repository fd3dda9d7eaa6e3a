"""Signals that ask a process to end, held back until what is under way is saved."""

import signal
import threading
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Held:
    """Holds these signals back in a block; what came is delivered at its end, or before.

    Delivered, a signal does what it did before the block. Those that are ignored, as by nohup, stay
    so, and outside of the main thread none is held.

    Attributes:
      came: The first that came, or None.

    Example:
      >>> before = signal.signal(signal.SIGINT, signal.default_int_handler)
      >>> try:
      ...     with Held() as held:
      ...         signal.raise_signal(signal.SIGINT)
      ...         print('saved')
      ... except KeyboardInterrupt:
      ...     print('stopped')
      saved
      stopped
      >>> _ = signal.signal(signal.SIGINT, before)
    """

    def __init__(self):
        self.came: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error):
        while self._before:
            signal.signal(*self._before.popitem())
        if self.came is not None:
            came, self.came = self.came, None
            signal.raise_signal(came)

    def deliver(self, came: int) -> None:
        """Delivers what came, here or elsewhere; what still runs after it is held again."""
        self.came = came
        self.__exit__()
        self.__enter__()

    def _note(self, number, frame):
        # A second one, as a terminal and its shell may both send, is the same wish.
        self.came = self.came or number
