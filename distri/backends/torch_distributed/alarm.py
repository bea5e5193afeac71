"""How the ranks of a run learn that one of them failed.

A rank that fails writes one sentence into the rendezvous store; every rank watches for it, so that whoever waits for a
value that will never come stops within a second and can name the culprit. Invariant: the first sentence stays.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time

from torch._C._distributed_c10d import Store

from distri.errors import RunError

WATCH_S = 0.25
SETTLE_S = 3 * WATCH_S
KEY = "alarm"


class LostPeerError(RunError):
    """This rank stopped because another one did: the consequence of a failure, not its cause."""


class Alarm:
    """One sentence about what went wrong elsewhere, once there is one. Safe to use from several threads."""

    def __init__(self) -> None:
        self._raised = threading.Event()
        self._sentence = ""

    def ring(self, sentence: str) -> None:
        """Raise the alarm; the first sentence stays."""
        if not self._raised.is_set():
            self._sentence = sentence
            self._raised.set()

    @property
    def sentence(self) -> str | None:
        """What happened, or None."""
        return self._sentence if self._raised.is_set() else None

    def settled(self) -> str | None:
        """As `sentence`, but after a wait in which the cause of a broken link has time to be told."""
        self._raised.wait(SETTLE_S)
        return self.sentence


class StoreWatch:
    """A thread that rings a rank's alarm when another rank has written its end into the store."""

    def __init__(self, store: Store, alarm: Alarm) -> None:
        self._store = store
        self._alarm = alarm
        self._closing = threading.Event()
        self._has_told = False
        self._thread = threading.Thread(target=self._run, name="distri-alarm", daemon=True)
        self._thread.start()

    def tell(self, sentence: str) -> None:
        """Tell every rank that this one failed; the first of several sentences stays."""
        self._alarm.ring(sentence)
        self._has_told = True
        with contextlib.suppress(RuntimeError):  # without a store there is no run: everybody stops by that
            self._store.compare_set(KEY, "", sentence)

    def linger(self) -> None:
        """Stay until the others have read what was told, if anything: the store may end with this process."""
        if self._has_told:
            time.sleep(2 * WATCH_S)

    def wait_for(self, key: str, limit_s: float) -> bool:
        """Whether `key` appears in the store in time, before any alarm."""
        deadline = time.monotonic() + limit_s
        try:
            while not self._store.check([key]):
                if self._alarm.sentence is not None or time.monotonic() > deadline:
                    return False
                time.sleep(0.005)
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join(timeout=5 * WATCH_S)

    def _run(self) -> None:
        try:
            while not self._closing.wait(WATCH_S):
                if self._store.check([KEY]):
                    self._alarm.ring(self._store.get(KEY).decode())
                    return
        except RuntimeError:
            self._alarm.ring("the rendezvous store is gone: rank 0 or its launcher stopped")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class; without gloo's source lines and advice."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"^\[\S+:\d+\] ", "", lines[0]) if lines else type(error).__name__
    return text.partition(". This is typically caused")[0]
