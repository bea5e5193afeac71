"""Recorded steps of one rank: what a step gives the device to do, messages included, done again without the host.

A step of a denoiser on a patch is thousands of small kernels, and a GPU can finish them sooner than Python starts
them. A CUDA graph holds all of them, and what the lanes do beside them, and is started as one. What a step does on the
host, it does only when it is recorded; of later steps of the same pattern (`distri.core.program.step_patterns`) the
transport is told what became of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from distri.backends.base import Recording, RecordingError
from distri.backends.torch_distributed.alarm import first_line
from distri.backends.torch_distributed.deliveries import Deliveries
from distri.backends.torch_distributed.transport import TorchTransport
from distri.backends.torch_distributed.wire import LinkError

R = TypeVar("R")


class DeviceGraph(Protocol):
    """What a device was given to do, taken down instead of done."""

    def capture(self, work: Callable[[], R]) -> R:
        """Take down what `work` gives the device; what it returns has no values before the first replay."""

    def replay(self) -> None:
        """Do it."""


class CudaGraphs:
    """Makes CUDA graphs that share their memory: they run one after the other and keep nothing for each other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self) -> DeviceGraph:
        """An empty graph."""
        return _CudaGraph(self._pool)


class _CudaGraph:
    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, work: Callable[[], R]) -> R:
        """Capture the current stream, and every stream that is forked from it and joined again.

        thread_local: NCCL's watchdog, a thread of its own, may go on asking for its events.
        """
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """Start the graph on the current stream."""
        self._graph.replay()


class TransportRecorder:
    """Implements `distri.backends.base.Recorder` for layers that meet other ranks through `transport`.

    all_agree: whether every rank says yes. NCCL wants a message that is recorded on one rank to be recorded on all.
    """

    def __init__(
        self,
        transport: TorchTransport,
        new_graph: Callable[[], DeviceGraph],
        all_agree: Callable[[bool], bool],
    ) -> None:
        self._transport = transport
        self._new_graph = new_graph
        self._all_agree = all_agree

    def record(self, step: int, work: Callable[[], R]) -> tuple[Recording, R]:
        """Record `work`, this rank's part of `step`, and do it.

        Raises:
            RecordingError: the device, or another rank's, cannot; the transport is where it was.
        """
        transport = self._transport
        transport.join()
        before = transport.deliveries
        transport.resume(before, 0)
        counted = transport.stats.counts
        graph = self._new_graph()

        def whole_work() -> R:
            output = work()
            transport.join()
            return output

        outputs: list[R] = []
        refusal = "another rank's device refused"
        try:
            outputs.append(graph.capture(whole_work))
        except (RuntimeError, LinkError) as error:
            refusal = first_line(error)
        if not self._all_agree(bool(outputs)):
            transport.resume(before, 0)
            transport.stats.count(counted, transport.stats.counts)
            raise RecordingError(f"a step cannot be recorded: {refusal}")
        graph.replay()
        after = transport.deliveries
        transport.resume(after, 0)
        return _Recording(transport, graph, step, after, (counted, transport.stats.counts)), outputs[0]


@dataclass(frozen=True)
class _Recording:
    """Implements `distri.backends.base.Recording`. after: what the transport had handed over when `step` was done."""

    transport: TorchTransport
    graph: DeviceGraph
    step: int
    after: Deliveries
    counts: tuple[tuple[int, int], tuple[int, int]]

    def replay(self, step: int) -> None:
        """Do the recorded step again, as `step`; the host is told afterwards, while the device is at work."""
        self.graph.replay()
        self.transport.resume(self.after, step - self.step)
        before, after = self.counts
        self.transport.stats.count(after, before)
