"""SIGTERM and Ctrl-C while a training runs: noted at once, obeyed after the step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes the signals inside its `with` block; outside, they do what they did before.

    A second Ctrl-C is not noted but raised, for a step that takes too long. Outside the main
    thread, which alone may set handlers, it does nothing.

    Attributes:
        received: The first signal that came, else None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.take_over()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            if handler is not None:
                _set(number, handler)

    def take_over(self) -> None:
        """Become the handler again after somebody else did, as Lightning's trainer does."""
        for number in SIGNALS:
            _set(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


def _set(number: int, handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)
