"""gloo's threads, told to wait for their turn (docs/decisions/0013).

A thread of gloo's does the sending and receiving. While another thread of the rank holds the lock of a connection, it
asks again and again instead of sleeping; and the very packet that wakes it up comes while that lock is held. If it
pushes the lock's holder off the core, both stand still until the scheduler's patience ends, some 4 ms later.
`SCHED_BATCH` is Linux's word for a thread that wakes up without pushing anyone off. It suits what is waited for, when
nothing is computed; what travels behind computation must not wait for the computation to pause.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress


@contextmanager
def giving_way() -> Iterator[None]:
    """Threads that are started inside push no running thread off its core; the caller itself stays as it was.

    Does nothing where the system knows no such threads or does not let us, or where the caller already runs under
    another policy than the usual one, which is then left to whoever chose it.
    """
    with ExitStack() as undo:
        if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
            with suppress(PermissionError):  # a container may forbid the call
                os.sched_setscheduler(
                    0, os.SCHED_BATCH, os.sched_param(0)
                )  # 0: this thread; new ones inherit
                undo.callback(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
        yield
