"""Ctrl-C and SIGTERM end a run between two steps, not in the middle of one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from qzo_diffusion.system.signals import handled


@contextmanager
def stop_on_signal(report: Callable[[str], None]) -> Iterator[threading.Event]:
    """The first signal sets the event, so that the step in hand is finished; a second one raises
    KeyboardInterrupt at once.

    Outside the main thread, where Python allows no handlers, the event is never set.
    """
    event = threading.Event()

    def request(_number: int, _frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        report("\nstopping after this step; once more to stop at once")

    with handled([signal.SIGINT, signal.SIGTERM], request):
        yield event
