"""The link probe: what messages between ranks cost here, through the same lanes and wires that a run uses.

Rank 0 meets every other rank in turn. Half a round trip of messages of growing size gives the latency; messages both
ways at once, as patches exchange them, give the rate of each way, or say that the two directions share the link; a
small message through a lane, awaited by both, says what an exchange costs at least; and a computation timed with and
without traffic beside it says by how much it slows down.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distri.backends.torch_distributed.alarm import Alarm
from distri.backends.torch_distributed.giving_way import giving_way
from distri.backends.torch_distributed.lane import StreamTicket, open_lane
from distri.backends.torch_distributed.wire import Addressed, Wire

SIZES = (64, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216)
LONGEST_ROUND_S = 0.4
SMALL_BYTES, MIDDLE_BYTES = 4096, 65536
ROUNDS = 7
SMALL_ROUNDS = 40
HALF_DUPLEX_FROM = 1.5
TIMEOUT_S = 60.0
BESIDE_S = 1.0
BETWEEN_S = 0.002
AWAITED_ROUNDS = 200


@dataclass(frozen=True)
class LinkReading:
    """One pair of ranks: `alpha_s + size / bytes_per_s` a message, and how well that fits.

    awaited_s: a small message both ways at once, handed to a lane and awaited by both, after some 2 ms of computing on
    CPUs: what each exchange costs a run that waits for it. slowdown: of a computation beside traffic, as a share of its
    time. points: (bytes, seconds).
    """

    first: int
    second: int
    alpha_s: float
    bytes_per_s: float
    mean_error: float
    awaited_s: float
    is_half_duplex: bool
    slowdown: float
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class LinkProbe:
    """All readings, and what they were taken on."""

    num_ranks: int
    library: str
    readings: tuple[LinkReading, ...]


def probe_links(num_ranks: int) -> LinkProbe:
    """Start `num_ranks` ranks here (or be one of those that torchrun started) and probe their links.

    Raises:
        RunError: a rank failed.
    """
    from distri.launch import run_ranks

    body = run_ranks(num_ranks, "distri.profiler.links:probe_as_rank", {"num_ranks": num_ranks})
    readings = tuple(
        LinkReading(**{**reading, "points": tuple((size, spent) for size, spent in reading["points"])})
        for reading in body["readings"]
    )
    return LinkProbe(body["num_ranks"], body["library"], readings)


def probe_as_rank(arguments: Mapping[str, Any], report: Callable[[Any], None]) -> dict[str, Any]:
    """One rank's part: plain JSON values, complete on rank 0."""
    device = _device()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    readings = []
    for other in range(1, size):
        late = dist.new_group([0, other], timeout=timedelta(seconds=TIMEOUT_S))
        with giving_way():
            urgent = dist.new_group([0, other], timeout=timedelta(seconds=TIMEOUT_S))
        dist.barrier()
        if rank in (0, other):
            wires = [Wire(g, (0, other), TIMEOUT_S, is_batched=device.type == "cuda") for g in (late, urgent)]
            readings.append(asdict(_Pair(wires[0], wires[1], rank == 0, other, device).read()))
    dist.barrier()
    dist.destroy_process_group()
    return {"num_ranks": size, "library": "nccl" if device.type == "cuda" else "gloo", "readings": readings}


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


class _Pair:
    """Rank 0 and one other: both run the same program; only rank 0's clock counts.

    wire: of what travels behind computation; urgent: of what is waited for (docs/decisions/0013).
    """

    def __init__(self, wire: Wire, urgent: Wire, is_first: bool, other: int, device: torch.device) -> None:
        self._wire = wire
        self._urgent = urgent
        self._is_first = is_first
        self._peer = 1 if is_first else 0
        self._other = other
        self._device = device
        self._lane = open_lane("distri-probe", device, Alarm())

    def read(self) -> LinkReading:
        """All measurements of the pair."""
        points = []
        for size in SIZES:
            seconds = self._half_round_trip(size)
            points.append((size, seconds))
            if self._agree(seconds > LONGEST_ROUND_S / 4):
                break
        largest = points[-1][0]
        both_ways = [(size, self._both_ways(size)) for size, _ in points[-2:]]
        is_half = both_ways[-1][1] > HALF_DUPLEX_FROM * points[-1][1]
        alpha_s, bytes_per_s, error = fit_line(points, points[-2:] if is_half else both_ways)
        awaited_s = self._through_lane(SIZES[0])
        slowdown = self._slowdown(min(largest, 1048576))
        self._lane.close()
        return LinkReading(
            0, self._other, alpha_s, bytes_per_s, error, awaited_s, is_half, slowdown, tuple(points)
        )

    def _buffers(self, size: int) -> tuple[list[Addressed], list[Addressed]]:
        data = torch.zeros(2, size, dtype=torch.uint8, device=self._device)
        return [(data[0], self._peer)], [(data[1], self._peer)]

    def _half_round_trip(self, size: int) -> float:
        sends, receives = self._buffers(size)

        def there_and_back() -> None:
            there: tuple[list[Addressed], list[Addressed]] = (sends, [])
            back: tuple[list[Addressed], list[Addressed]] = ([], receives)
            for out, into in (there, back) if self._is_first else (back, there):
                self._wire.exchange(out, into)

        return self._median(there_and_back, SMALL_ROUNDS if size <= MIDDLE_BYTES else ROUNDS) / 2

    def _both_ways(self, size: int) -> float:
        sends, receives = self._buffers(size)
        return self._median(lambda: self._wire.exchange(sends, receives))

    def _through_lane(self, size: int) -> float:
        sends, receives = self._buffers(size)

        def awaited() -> None:
            ticket = self._lane.submit(lambda: self._urgent.exchange(sends, receives))
            ticket.wait()
            if isinstance(ticket, StreamTicket):
                torch.cuda.synchronize(self._device)

        if self._device.type == "cuda":
            return self._median(awaited, SMALL_ROUNDS)
        a = torch.randn(128, 128)
        count = max(1, round(BETWEEN_S / self._shared_maximum(_time_per_product(a))))

        # Between two exchanges a layer is computed: cores fall asleep, threads lose their turn, ranks get out of step.
        # A step meets all that, each time anew, so it is the mean that counts.
        waited_s = 0.0
        for _ in range(AWAITED_ROUNDS):
            for _ in range(count):
                a @ a
            start = time.perf_counter()
            awaited()
            waited_s += time.perf_counter() - start
        return waited_s / AWAITED_ROUNDS

    def _slowdown(self, size: int) -> float:
        """By how much a computation slows down beside traffic in both directions; on a CPU only."""
        if self._device.type == "cuda":
            return 0.0
        a = torch.randn(128, 128)
        alone_s = _time_per_product(a)
        sends, receives = self._buffers(size)
        start = time.perf_counter()
        self._wire.exchange(sends, receives)
        count = max(2, round(BESIDE_S / max(self._shared_maximum(time.perf_counter() - start), 1e-4)))
        tickets = [self._lane.submit(lambda: self._wire.exchange(sends, receives)) for _ in range(count)]
        beside_s = _time_per_product(a, until=lambda: tickets[-1].is_done)
        tickets[-1].wait()
        return max(0.0, beside_s / alone_s - 1)

    def _median(self, call: Callable[[], None], rounds: int = ROUNDS) -> float:
        readings = []
        for number in range(rounds + 1):
            start = time.perf_counter()
            call()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            spent = time.perf_counter() - start
            if number:
                readings.append(spent)
            if self._agree(number >= 2 and spent > LONGEST_ROUND_S):
                break
        return statistics.median(readings)

    def _agree(self, first_says: bool) -> bool:
        """What rank 0 says, on both sides."""
        flag = torch.tensor([int(first_says)], device=self._device)
        self._tell(flag)
        return bool(flag.item())

    def _shared_maximum(self, seconds: float) -> float:
        value = torch.tensor([seconds], device=self._device)
        self._tell(value)
        return float(value.item())

    def _tell(self, value: Tensor) -> None:
        if self._is_first:
            self._wire.exchange([(value, self._peer)], [])
        else:
            self._wire.exchange([], [(value, self._peer)])


def _time_per_product(a: Tensor, until: Callable[[], bool] | None = None) -> float:
    """Mean seconds of a small matrix product, for `BESIDE_S` or until something is over."""
    count, start = 0, time.perf_counter()
    while count < 10 or (not until() if until is not None else time.perf_counter() - start < BESIDE_S / 4):
        for _ in range(10):
            a @ a
        count += 10
    return (time.perf_counter() - start) / count


def fit_line(
    points: Sequence[tuple[int, float]], ends: Sequence[tuple[int, float]]
) -> tuple[float, float, float]:
    """alpha, beta and the mean relative error of `alpha + size / beta`; all points are (bytes, seconds).

    beta is the slope between the two `ends`, alpha the median of what the small `points` took beyond their bytes: a
    least-squares line would let one disturbed reading turn it, and a shaper's bucket bends it at small sizes.

    >>> fit_line([(0, 1.0), (100, 2.0), (300, 4.0)], [(100, 2.0), (300, 4.0)])
    (1.0, 100.0, 0.0)
    """
    (size, spent), (largest, longest) = ends
    per_byte = max((longest - spent) / (largest - size), 1e-13)
    small = [max(s - b * per_byte, 1e-7) for b, s in points if b <= SMALL_BYTES]
    alpha = statistics.median(small)
    errors = [abs((alpha + b * per_byte) / s - 1) for b, s in points]
    return round(alpha, 9), float(f"{1 / per_byte:.9g}"), round(statistics.fmean(errors), 6)
