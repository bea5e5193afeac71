"""A rank of `distri run` that meets a fault on purpose: what `test_faults` starts in place of the product's own body.

DISTRI_TEST_FAULT holds {"kind", "phase", "rank", "begun"}: the last is a file that is made when the fault begins.
Without it, or on another rank, nothing is different.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distri import executor

VARIABLE = "DISTRI_TEST_FAULT"
STEPS, WARMUP = 6, 2
STEP_OF = {"warm-up": 1, "steady": 4}
LAYER = "mid_block.resnets.1.norm1"


def run_as_rank(arguments: dict[str, Any], progress: Any = None) -> dict[str, Any]:
    """The body of a rank, with a fault in it."""
    fault = json.loads(os.environ.get(VARIABLE, "null"))
    if fault is not None and str(fault["rank"]) == os.environ["RANK"]:
        _install(fault["phase"], fault["kind"], Path(fault["begun"]))
    return executor.run_as_rank(arguments, progress)


def _install(phase: str, kind: str, begun: Path) -> None:
    import distri.models.load as loading

    def fault() -> None:
        begun.touch()
        FAULTS[kind]()

    load = loading.load_pipeline
    if (kind, phase) == ("closed socket", "load"):  # nothing is open while weights are read: right after it
        handshake = executor.take_precautions

        def cut_off(*arguments: Any) -> None:
            fault()
            handshake(*arguments)

        executor.take_precautions = cut_off
        return

    def load_pipeline(name: str, dtype: str = "float32") -> Any:
        if phase == "load":
            fault()
        pipe = load(name, dtype)
        if phase == "decode":
            decode = pipe.vae.decode

            def faulty(*args: Any, **more: Any) -> Any:
                fault()
                return decode(*args, **more)

            pipe.vae.decode = faulty
        elif phase in STEP_OF:
            _hook(pipe.unet.get_submodule(LAYER), STEP_OF[phase], fault)
        return pipe

    loading.load_pipeline = load_pipeline


def _hook(module: torch.nn.Module, step: int, fault: Callable[[], None]) -> None:
    calls = []

    def before(*_: Any) -> None:
        calls.append(None)
        if len(calls) == step + 1:
            fault()

    module.register_forward_pre_hook(before)


def _signal(number: signal.Signals) -> Callable[[], None]:
    def fault() -> None:
        os.kill(os.getpid(), number)
        time.sleep(300)

    return fault


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 GiB.\nSee the documentation.")


def _disk_is_full() -> None:
    """From here on, nothing can be written to any disk."""
    import PIL.Image

    import distri.checkpoint

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    distri.checkpoint.save_file = refuse
    PIL.Image.Image.save = refuse  # type: ignore[method-assign]


def _close_sockets() -> None:
    """Shut every connection of this process, as a dead link does."""
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):  # not a socket, or not a connected one
            connection = socket.socket(fileno=os.dup(int(descriptor.name)))
            listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if connection.family in (socket.AF_INET, socket.AF_INET6) and not listens:
                connection.shutdown(socket.SHUT_RDWR)
            connection.detach()


FAULTS: dict[str, Callable[[], None]] = {
    "kill -9": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "out of memory": _out_of_memory,
    "disk full": _disk_is_full,
    "closed socket": _close_sockets,
}
