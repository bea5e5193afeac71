"""Runs one function on several ranks of this host, each in a process of its own, and leaves none behind.

    run_ranks(2, "package.module:function", {"seed": 1}) -> what the function returns on rank 0

The function is called as `function(arguments, report)`; both `arguments` and what it returns are plain JSON values, and
what it passes to `report` on rank 0 is passed to `on_progress` here. Under torchrun (RANK and WORLD_SIZE are set) the
ranks exist already: the function runs in this process and nothing is started.

Invariant: when `run_ranks` returns or raises, no process that it started is alive. Ranks also die with this process,
whatever ends it (Linux). If a rank fails, the others are stopped and the *cause* is raised, not a rank that lost it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from distri import errors
from distri.errors import DistriError, RunError, UserError

Report = Callable[..., None]
Target = Callable[[Any, Report], Any]

LOOPBACK = "127.0.0.1"
SETTLE_S = 3.0
LIFE_S = 1.0
TERM_S = 1.0
TAIL_BYTES = 2000
CONSEQUENCE = "LostPeerError"
KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""Has glibc keep what a rank frees for its next layer: otherwise the kernel clears thousands of pages a step anew."""


def under_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is already one of several ranks, as torchrun (or `run_ranks`) starts them."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def run_ranks(
    num_ranks: int,
    target: str,
    arguments: Any,
    *,
    timeout_s: float = 60.0,
    on_progress: Report | None = None,
) -> Any:
    """Run `target` ("module:function") on `num_ranks` ranks; returns rank 0's result (under torchrun, this rank's).

    timeout_s: how long a rank may give no sign of life; and once rank 0 is done, how long the others may take. How
    long ranks wait for one another's values is the backend's affair.

    Raises:
        UserError: a rank raised one.
        RunError: a rank failed, died or did not finish; names the rank.
    """
    report = on_progress or _ignore
    if under_launcher():
        return load_target(target)(arguments, report if os.environ["RANK"] == "0" else _ignore)
    if num_ranks < 1:
        raise UserError(f"at least 1 rank is needed, not {num_ranks}")
    load_target(target, only_check=True)
    ranks: list[_Rank] = []
    try:
        _start(ranks, num_ranks, target, json.dumps(arguments))
        return _watch(ranks, timeout_s, report)
    finally:
        _stop(ranks)


def load_target(target: str, only_check: bool = False) -> Target:
    """The function that "module:function" names; with `only_check`, just look at the form.

    Raises:
        UserError: the text is not of that form.
    """
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise UserError(f"a target is written 'module:function', not {target!r}")
    if only_check:
        return _ignore_all
    function: Target = getattr(importlib.import_module(module), name)
    return function


def threads_per_rank(num_ranks: int) -> int:
    """Threads that a rank computes with, so that the ranks of a host share its cores and nothing more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_ranks)


@dataclass
class _Rank:
    """A rank's process as its parent sees it. `lines` is what it has said so far, parsed."""

    rank: int
    process: subprocess.Popen[bytes]
    pipe: IO[bytes]
    stderr: IO[bytes] | None
    pending: bytes = b""
    is_open: bool = True
    result: Any = None
    has_result: bool = False
    failure: tuple[str, str] | None = field(default=None)
    heard_s: float = field(default_factory=time.monotonic)
    ticks: int = 0

    @property
    def who(self) -> str:
        """The rank, as it names itself."""
        return f"rank {self.rank} ({socket.gethostname()}, pid {self.process.pid})"

    def read(self) -> list[Any]:
        """Take in what the pipe holds; returns progress reports."""
        data = os.read(self.pipe.fileno(), 1 << 16)
        self.heard_s = time.monotonic()
        self.is_open = bool(data)
        *lines, self.pending = (self.pending + data).split(b"\n")
        return [report for line in lines for report in self._take(json.loads(line))]

    def _take(self, message: dict[str, Any]) -> list[Any]:
        if "result" in message:
            self.result, self.has_result = message["result"], True
        elif "error" in message:
            kind, text = message["error"]
            self.failure = (kind, text)
        elif "progress" in message:
            return [message["progress"]]
        return []

    def check_life(self, timeout_s: float) -> None:
        """Note that a rank was stopped, or hangs so that not even its sign of life comes.

        One that uses the processor is alive, even if it is too busy to say so, as it may be while it loads.
        """
        ticks = _processor_ticks(self.process.pid)
        if ticks != self.ticks:
            self.ticks, self.heard_s = ticks, time.monotonic()
        silent_s = time.monotonic() - self.heard_s
        if self.is_open and self.failure is None and silent_s > timeout_s:
            self.failure = ("RunError", f"{self.who}: gave no sign of life for {timeout_s:g} s")

    def finish(self) -> None:
        """Called once the pipe is closed: wait for the end, and note a death without a word."""
        try:
            code = self.process.wait(timeout=SETTLE_S)
        except subprocess.TimeoutExpired:
            return
        if self.failure is None and (code != 0 or not self.has_result):
            self.failure = ("RunError", f"{self.who}: {_death(code)}{self._tail()}")

    def _tail(self) -> str:
        if self.stderr is None:
            return ""
        self.stderr.seek(0, os.SEEK_END)
        self.stderr.seek(max(0, self.stderr.tell() - TAIL_BYTES))
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        return f"; it said last: {lines[-1]}" if lines else ""


def _processor_ticks(pid: int) -> int:
    """How long a process has computed, in the kernel's ticks; 0 where that cannot be known."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit status {code} and no result"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-code} ({name})"


def _start(ranks: list[_Rank], num_ranks: int, target: str, arguments: str) -> None:
    """Start all ranks. The rendezvous port is bound here and handed to rank 0, so nobody else can take it."""
    with socket.create_server((LOOPBACK, 0), backlog=max(128, num_ranks)) as listener:
        for rank in range(num_ranks):
            reader, writer = os.pipe()
            stderr = None if rank == 0 else tempfile.TemporaryFile()  # noqa: SIM115 - closed by `_stop`
            fds = [writer, listener.fileno()] if rank == 0 else [writer]
            settings = {
                "life_s": LIFE_S,
                "target": target,
                "arguments": arguments,
                "pipe": writer,
                "listener": listener.fileno() if rank == 0 else None,
                "parent": os.getpid(),
                "path": sys.path,
            }
            process = subprocess.Popen(
                [sys.executable, "-m", "distri.launch"],
                stdin=subprocess.PIPE,
                stdout=2,  # standard output belongs to this process's own result
                stderr=stderr,
                env=_environment(rank, num_ranks, listener.getsockname()[1]),
                pass_fds=fds,
                start_new_session=True,
            )
            ranks.append(_Rank(rank, process, os.fdopen(reader, "rb", buffering=0), stderr))
            os.close(writer)
            assert process.stdin is not None
            try:
                with process.stdin as stdin:
                    stdin.write(json.dumps(settings).encode())
            except BrokenPipeError:
                pass  # it is dead already, which `_watch` finds out


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The environment of a rank: as under torchrun, on loopback unless the user has set other interfaces."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    package_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "OMP_NUM_THREADS": str(threads_per_rank(num_ranks)),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        **KEPT_MEMORY,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0's launcher serves the store, on the port bound above
        "PYTHONPATH": os.pathsep.join(paths),
    }


def _watch(ranks: Sequence[_Rank], timeout_s: float, report: Report) -> Any:
    """Listen to all ranks until each has ended, or one has failed."""
    deadline: float | None = None
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.pipe, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select(timeout=0.2):
                _listen(key.data, selector, report)
            for rank in ranks:
                rank.check_life(timeout_s + LIFE_S)
            if deadline is None:
                if any(rank.failure for rank in ranks):
                    deadline = time.monotonic() + SETTLE_S
                elif ranks[0].has_result:
                    deadline = time.monotonic() + timeout_s
            failed = any(rank.failure for rank in ranks)
            if deadline is not None and failed:
                deadline = min(deadline, time.monotonic() + SETTLE_S)
            if deadline is not None and time.monotonic() > deadline:
                break
    _raise_cause(ranks, timeout_s)
    return ranks[0].result


def _listen(rank: _Rank, selector: selectors.BaseSelector, report: Report) -> None:
    for progress in rank.read():
        if rank.rank == 0:
            report(*progress)
    if not rank.is_open:
        selector.unregister(rank.pipe)
        rank.finish()


def _raise_cause(ranks: Sequence[_Rank], timeout_s: float) -> None:
    """Raise the failure that the others follow from, if there is any."""
    failures = [rank.failure for rank in ranks if rank.failure is not None]
    causes = [failure for failure in failures if failure[0] != CONSEQUENCE]
    echoes = [text for kind, text in failures if kind == CONSEQUENCE]
    if causes:
        kind, message = causes[0]
        raise _error_class(kind)(
            message if issubclass(_error_class(kind), UserError) else _placed(message, echoes)
        )
    if echoes:
        raise RunError(_nearest(echoes, [rank.rank for rank in ranks if rank.failure is not None]))
    late = [rank.who for rank in ranks if not rank.has_result]
    if late:
        raise RunError(f"{', '.join(late)}: not finished {timeout_s:g} s after rank 0")


def _placed(message: str, echoes: Sequence[str]) -> str:
    """A cause with its step and layer, as far as the ranks that met it know."""
    who, _, what = message.partition(": ")
    if f"{who}: step" in message or not echoes:
        return message
    told = [echo[echo.index(f"{who}: step") :] for echo in echoes if f"{who}: step" in echo]
    whole = next((sentence for sentence in told if sentence.endswith(what)), None)
    return whole if whole is not None else f"{message}; met by {(told or echoes)[0]}"


def _nearest(echoes: Sequence[str], speaking: Sequence[int]) -> str:
    """If all is silence: the sentence of a rank that waited for one that says nothing itself."""
    silent = (
        echo
        for echo in echoes
        if (lost := re.search(r"lost rank (\d+)", echo)) and int(lost[1]) not in speaking
    )
    return next(silent, echoes[0])


def _error_class(name: str) -> type[DistriError]:
    found = getattr(errors, name, RunError)
    return found if isinstance(found, type) and issubclass(found, DistriError) else RunError


def _stop(ranks: Sequence[_Rank]) -> None:
    """End every rank and whatever it started, and wait until they are gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for rank in ranks:
            _signal_group(rank.process, number)
        deadline = time.monotonic() + TERM_S
        while number is signal.SIGTERM and time.monotonic() < deadline:
            if all(rank.process.poll() is not None for rank in ranks):
                break
            time.sleep(0.02)
    for rank in ranks:
        rank.process.wait()
        rank.pipe.close()
        if rank.stderr is not None:
            rank.stderr.close()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group may be gone
        os.killpg(process.pid, number)


def _ignore(*_: Any) -> None:
    """Progress that nobody asked for."""


def _ignore_all(arguments: Any, report: Report) -> Any:
    raise AssertionError("a target that was only checked is never called")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends (Linux only)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _main() -> int:
    """A rank: read the settings from standard input, run the target, tell the parent how it went."""
    settings = json.loads(sys.stdin.buffer.read())
    die_with_parent(settings["parent"])
    sys.path[:] = settings["path"]
    with os.fdopen(settings["pipe"], "w", encoding="utf-8") as pipe:
        os.set_inheritable(pipe.fileno(), False)

        lock = threading.Lock()

        def say(message: dict[str, Any]) -> None:
            with lock:
                pipe.write(json.dumps(message) + "\n")
                pipe.flush()

        ended = threading.Event()
        threading.Thread(
            target=_live, args=(say, settings["life_s"], ended), name="life", daemon=True
        ).start()
        try:
            return _run(settings, say)
        finally:
            ended.set()


def _live(say: Callable[[dict[str, Any]], None], period_s: float, ended: threading.Event) -> None:
    """Give a sign of life until the rank has ended; a process that is stopped gives none."""
    while not ended.wait(period_s):
        with contextlib.suppress(ValueError, OSError):  # the pipe closes while this thread is at it
            say({"alive": True})


def _run(settings: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> int:
    is_first = settings["listener"] is not None
    report: Report = (lambda *values: say({"progress": values})) if is_first else _ignore
    try:
        store = _serve_store(settings["listener"]) if is_first else None
        result = load_target(settings["target"])(json.loads(settings["arguments"]), report)
        say({"result": result if is_first else None})
        del store
        return 0
    except BaseException as error:  # noqa: BLE001 - the last chance to say why this rank ends
        say({"error": [type(error).__name__, _sentence(error)]})
        if not isinstance(error, DistriError):
            sys.excepthook(type(error), error, error.__traceback__)
        return 2 if isinstance(error, UserError) else 1


def _sentence(error: BaseException) -> str:
    """What went wrong, with this rank's name in front unless the error is the user's or names one."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, UserError) or text.startswith("rank "):
        return text
    if not isinstance(error, DistriError):  # the traceback says the rest
        text = f"{type(error).__name__}: {text.splitlines()[0]}"
    return f"rank {os.environ['RANK']} ({socket.gethostname()}, pid {os.getpid()}): {text}"


def _serve_store(listener: int) -> Any:
    """The rendezvous store of this run, on the socket that the parent has bound; lives as long as rank 0."""
    from torch._C._distributed_c10d import TCPStore

    port = int(os.environ["MASTER_PORT"])
    return TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener)


if __name__ == "__main__":
    code = _main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that hang in a broken link must not keep a failed rank alive
