"""Models of transformers without memory for their weights."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_one_at_a_time = threading.RLock()  # both libraries replace functions of torch for all threads


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, a model that is built has parameters on the meta device, and real buffers:
    transformers computes some of them, and files lack those.

    Weights are neither drawn nor tied: drawing numbers that nothing holds takes most of the time.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with _one_at_a_time, no_init_weights(), init_empty_weights(include_buffers=False):
        yield
