"""For processes that are to die in the middle of writing tensors, as a kill would have it."""

import os
import signal


def kill_while_writing(module, left):
    """`module.write_tensors` ends this process when it has written `left` tensors."""
    plain = module.write_tensors

    def write(file, tensors, metadata, progress):
        count = iter(range(10**6))

        def step(nbytes):
            if next(count) == left:
                os.kill(os.getpid(), signal.SIGKILL)

        plain(file, tensors, metadata, step)

    module.write_tensors = write
