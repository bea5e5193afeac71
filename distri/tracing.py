"""What a run did when, recorded by torch.profiler and written as the simulator writes what it predicts: the same tracks
under the same names, so that the two can be opened side by side.

Recorded are a few steps only: the last of warm-up and some steady ones. On a CPU the compute track has the layers, by
their paths, what they waited for, and their operations; a message's slice is the time that its lane was at it. On a GPU
tracks have the kernels, NCCL's on those of the communication, and the layers are on the host's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from distri.backends.base import Backend
from distri.core.plan import Plan
from distri.core.staleness import phase_of
from distri.simulator.tasks import COMPUTE_STREAM, FRESH_STREAM, HOST_LANE, LATE_STREAM, STREAM_NAMES
from distri.simulator.trace import STEP_TRACK, TRACKS, Event, dump_trace, event_order, rank_names, slice_event

STEADY_STEPS: Final = 4
LAYER: Final = "layer"
WAITS: Final = "waits for"
KINDS: Final = {
    LAYER: COMPUTE_STREAM,
    WAITS: COMPUTE_STREAM,
    "late": LATE_STREAM,
    "fresh": FRESH_STREAM,
}
"""First words of a span's name, and the stream that it is drawn on."""

Progress = Callable[[int, int], None]


class Slice(NamedTuple):
    """A stretch of one track, in nanoseconds of the host's clock. `stream` is None for the track of the steps."""

    name: str
    category: str
    stream: int | None
    start_ns: int
    end_ns: int


def traced_steps(plan: Plan) -> range:
    """The last step of warm-up and the first steady ones.

    >>> from types import SimpleNamespace as Some
    >>> traced_steps(Some(warmup_steps=5, image=Some(num_inference_steps=50)))
    range(4, 9)
    """
    first = max(0, plan.warmup_steps - 1)
    steps = plan.image.num_inference_steps
    return range(min(first, steps - 1), min(steps, first + 1 + STEADY_STEPS))


class RunTracer:
    """Records the traced steps of this process's rank; entered before the first step, and told when each is done."""

    def __init__(self, model: nn.Module, backend: Backend) -> None:
        self._backend = backend
        (self._rank,) = backend.local_ranks
        self._steps = traced_steps(backend.plan)
        self._model = model
        self._profiler: Any = None
        self._edges_ns: list[int] = []
        self._undo = ExitStack()

    def __enter__(self) -> RunTracer:
        if self._steps.start == 0:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def following(self, progress: Progress | None) -> Progress:
        """`progress`, after this tracer was told."""

        def told(done: int, total: int) -> None:
            self.step_done(done - 1)
            if progress is not None:
                progress(done, total)

        return told

    def step_done(self, step: int) -> None:
        """Begin behind the step before the first traced one, end behind the last."""
        if step in self._steps:
            self._edges_ns.append(time.time_ns())
        if step + 1 == self._steps.start:
            self._start()
        elif step + 1 == self._steps.stop:
            self._undo.close()

    def _start(self) -> None:
        for path, module in self._model.named_modules():
            if not any(module.children()):
                self._name_layer(path, module)
        self._undo.enter_context(self._backend.traced(record_function))
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # lanes are threads
        self._profiler = self._undo.enter_context(profile(activities=activities, experimental_config=config))
        self._edges_ns.append(time.time_ns())

    def _name_layer(self, path: str, module: nn.Module) -> None:
        spans: list[Any] = []

        def enter(_: nn.Module, __: Any) -> None:
            spans.append(record_function(f"{LAYER} {path}"))
            spans[-1].__enter__()

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            spans.pop().__exit__(None, None, None)

        self._undo.callback(module.register_forward_pre_hook(enter).remove)
        self._undo.callback(module.register_forward_hook(leave).remove)

    def together(self, title: str) -> str | None:
        """The text of the trace of all ranks, on rank 0; None on the others. All ranks call it."""
        parts = self._backend.collect(json.dumps([*self._step_slices(), *self._slices()]))
        if parts is None:
            return None
        ranks = [[Slice(*values) for values in json.loads(part)] for part in parts]
        return dump_trace(
            {
                "displayTimeUnit": "ms",
                "otherData": {"title": title, "simulated": "no"},
                "traceEvents": [*_names(ranks), *_events(ranks)],
            }
        )

    def _step_slices(self) -> Iterator[Slice]:
        plan = self._backend.plan
        for step, (start, end) in zip(self._steps, pairwise(self._edges_ns), strict=False):
            yield Slice(f"step {step}, {phase_of(step, plan.warmup_steps).value}", "step", None, start, end)

    def _slices(self) -> list[Slice]:
        if self._profiler is None:
            return []
        found = sorted(
            self._profiler.profiler.kineto_results.events(), key=lambda e: (e.start_ns(), -e.duration_ns())
        )
        on_gpu = any(_is_kernel(event) for event in found)
        kept: list[Slice] = []
        ends: dict[int, int] = {}
        for event in found:
            made = _kernel(event) if _is_kernel(event) else _span(event, on_gpu, ends)
            if made is not None:
                kept.append(made)
        return kept


def _is_kernel(event: Any) -> bool:
    return bool(event.device_type() == torch.profiler.DeviceType.CUDA)


def _kernel(event: Any) -> Slice:
    """One of a GPU's own."""
    name = event.name()
    return _slice(event, name, LATE_STREAM if "nccl" in name.lower() else COMPUTE_STREAM)


def _span(event: Any, on_gpu: bool, ends: dict[int, int]) -> Slice | None:
    """A span of ours, or the outermost of nested operations of PyTorch. ends: of those, by thread."""
    name = event.name()
    for kind, stream in KINDS.items():
        if name.startswith(f"{kind} "):
            label = name if kind == WAITS else name.removeprefix(f"{kind} ")
            return _slice(event, label, HOST_LANE if on_gpu else stream)
    thread, end = event.start_thread_id(), event.start_ns() + event.duration_ns()
    if not name.startswith("aten::") or end <= ends.get(thread, 0):
        return None
    ends[thread] = end
    return _slice(event, name, HOST_LANE if on_gpu else COMPUTE_STREAM)


def _slice(event: Any, name: str, stream: int) -> Slice:
    category = "communication" if stream in (LATE_STREAM, FRESH_STREAM) else STREAM_NAMES[stream]
    if name.startswith(f"{WAITS} "):
        category = "wait"
    return Slice(name, category, stream, event.start_ns(), event.start_ns() + event.duration_ns())


def _names(ranks: Sequence[Sequence[Slice]]) -> Iterator[Event]:
    for rank, slices in enumerate(ranks):
        yield from rank_names(rank, {s.stream for s in slices if s.stream is not None})


def _events(ranks: Sequence[Sequence[Slice]]) -> list[Event]:
    """In order, the earliest at zero: ranks of one host have one clock."""
    zero = min((s.start_ns for slices in ranks for s in slices), default=0)
    found = [
        slice_event(
            s.name,
            s.category,
            rank,
            STEP_TRACK if s.stream is None else TRACKS[s.stream],
            s.start_ns - zero,
            s.end_ns - zero,
        )
        for rank, slices in enumerate(ranks)
        for s in slices
    ]
    return sorted(found, key=event_order)
