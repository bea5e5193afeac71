"""What the ranks of `test_torch_distributed` run, and the contract in plain Python that they are held to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distri.backends.torch_distributed import TorchBackend
from distri.core.exchanger import Exchanger
from distri.core.graph import LayerGraph, Operation, OperationKind
from distri.core.ops.conv2d import ConvGeometry
from distri.core.partition import SplitAxis
from distri.core.plan import Exchange, ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import ExchangeKind, Phase, Policy, PolicyRule, PolicyTable, policy_table
from distri.core.program import awaited_version
from distri.core.traffic import messages
from distri.errors import UserError
from distri.nn.conv2d import cut
from distri.nn.group_norm import merge_moments

CHANNELS = 6
STEPS = 6


def toy_graph() -> LayerGraph:
    """Every kind of exchange at two levels: kernels of 3 and 5, a stride, norms and self-attentions."""
    full, half = ("B", CHANNELS, "H/1", "W/1"), ("B", CHANNELS, "H/2", "W/2")
    tokens = ("B", "HW/2", CHANNELS)
    three, five = ConvGeometry((3, 3), padding=(1, 1)), ConvGeometry((5, 5), padding=(2, 2))
    down = ConvGeometry((3, 3), stride=(2, 2), padding=(1, 1))
    conv, norm, attend = OperationKind.CONVOLUTION, OperationKind.GROUP_NORM, OperationKind.SELF_ATTENTION
    rows: list[tuple[str, OperationKind, Any, Any, ConvGeometry | None]] = [
        ("conv_in", conv, ("B", 4, "H/1", "W/1"), full, three),
        ("norm1", norm, full, full, None),
        ("conv1", conv, full, full, five),
        ("down", conv, full, half, down),
        ("norm2", norm, half, half, None),
        ("attend1", attend, tokens, tokens, None),
        ("conv2", conv, half, half, three),
        ("norm3", norm, half, half, None),
        ("attend2", attend, tokens, tokens, None),
        ("conv3", conv, full, full, three),
    ]
    operations = tuple(
        Operation(
            index, path, kind, (before,) * (3 if kind is attend else 1), after,
            parents=(index - 1,) if index else (), geometry=geometry, groups=3 if kind is norm else 1,
        )
        for index, (path, kind, before, after, geometry) in enumerate(rows)
    )  # fmt: skip
    return LayerGraph("toy", operations, latent_channels=4, text_width=8)


def toy_plan(case: dict[str, Any]) -> Plan:
    """The plan that a test's JSON asks for."""
    weights = tuple(Fraction(w) for w in case["weights"]) if case.get("weights") else None
    return make_plan(
        PlanRequest(
            ImageRequest(case.get("height", 96), case.get("width", 64), case.get("steps", STEPS)),
            case["ranks"],
            case.get("cfg_split", False),
            _table(case),
            case.get("warmup", 2),
            SplitAxis(case.get("axis", "rows")),
            weights,
            layers_per_bucket=case.get("layers_per_bucket", 3),
        ),
        toy_graph(),
    )


def _table(case: dict[str, Any]) -> PolicyTable:
    kinds = [ExchangeKind(kind) for kind in case.get("local_warmup", ())]
    rules = tuple(PolicyRule(kind, Phase.WARMUP, Policy.LOCAL) for kind in kinds)
    return policy_table(case.get("policy", "corrected")).with_rules(rules)


class Oracle:
    """What each rank makes at each step, and what the contract lets each rank see of it."""

    def __init__(self, plan: Plan, image: int) -> None:
        self.plan = plan
        self.image = image

    def made(self, exchange: Exchange, rank: int, step: int) -> Tensor:
        """A rank's own value: its patch of the activation, its moments, or its keys and values."""
        seed = hash((self.image, exchange.index, rank, step)) % 2**31
        generator = torch.Generator().manual_seed(seed)
        patch = self.plan.partition.patches[self.plan.mesh.patch_of(rank)].at_level(exchange.level)
        if exchange.kind is ExchangeKind.MOMENTS:
            return torch.rand(exchange.shape, generator=generator) + 1
        if exchange.kind is ExchangeKind.CONTEXT:
            return torch.randn(patch.area, *exchange.shape[1:], generator=generator)
        shape = (*exchange.shape[:2], patch.rows.size, patch.cols.size)
        return torch.randn(shape, generator=generator)

    def sent(self, exchange: Exchange, rank: int, step: int) -> list[Tensor]:
        """What a layer publishes."""
        value = self.made(exchange, rank, step)
        if exchange.kind is not ExchangeKind.HALO:
            return [value]
        own = self.plan.mesh.patch_of(rank)
        return [
            self._piece(exchange, rank, step, m.rect) for m in self._messages(exchange) if m.source == own
        ]

    def seen(self, exchange: Exchange, rank: int, step: int, phase: Phase) -> list[Tensor] | None:
        """What a layer must collect: own values of `step`, the others' of the version that the policy names."""
        version = awaited_version(self.plan, exchange, step, phase)
        if version is None:
            return None
        own, peers = self.plan.mesh.patch_of(rank), self.plan.mesh.peers(rank)
        if exchange.kind is ExchangeKind.HALO:
            found = [m for m in self._messages(exchange) if m.reader == own]
            return [self._piece(exchange, peers[m.source], version, m.rect) for m in found]
        if exchange.kind is ExchangeKind.CONTEXT:
            return [torch.cat([self.made(exchange, r, step if r == rank else version) for r in peers])]
        sides = [peers[:own], peers[:own:-1]]
        return [self._folded([self.made(exchange, r, version) for r in side]) for side in sides if side]

    def _messages(self, exchange: Exchange) -> Any:
        patches = self.plan.partition.patches
        return messages(exchange.kind, exchange.shape, exchange.level, exchange.geometry, patches)

    def _piece(self, exchange: Exchange, rank: int, step: int, rect: Any) -> Tensor:
        patch = self.plan.partition.patches[self.plan.mesh.patch_of(rank)].at_level(exchange.level)
        return cut(self.made(exchange, rank, step), rect, patch)

    @staticmethod
    def _folded(moments: list[Tensor]) -> Tensor:
        total = moments[0]
        for own in moments[1:]:
            total = merge_moments(total, own)
        return total


def hold_contracts(cases: list[dict[str, Any]], report: Any) -> list[dict[str, Any]]:
    """One backend after the other in the same processes."""
    return [hold_contract(case, report) for case in cases]


def hold_contract(case: dict[str, Any], report: Any) -> dict[str, Any]:
    """Drive the plan with an oracle beside it; returns what the arena and the transport did."""
    plan = toy_plan(case)
    backend = TorchBackend(plan, timeout_s=20)
    transport = backend.transport(backend.rank)
    exchanger = Exchanger(plan, backend.rank, transport)
    delay = random.Random(backend.rank)
    allocations: list[int] = []
    places: list[list[int]] = []
    parcels: list[int] = []
    for image in range(case.get("images", 1)):
        oracle = Oracle(plan, image)
        exchanger.begin_image()
        for step in range(plan.image.num_inference_steps):
            exchanger.begin_step(Phase.WARMUP if step in case.get("refreshed", ()) else None)
            _one_step(plan, exchanger, oracle, step, delay if case.get("delays") else None)
            allocations.append(transport.arena.num_allocations)
            places.append([t.data_ptr() for t in transport.arena.whole.values()])
            parcels.append(transport.stats.num_parcels)
            report(step)
    backend.close()
    steady = plan.warmup_steps
    return {
        "allocations": allocations[steady:],
        "places_stay": all(place == places[steady] for place in places[steady:]),
        "bytes_received": transport.stats.bytes_received,
        "messages": parcels,
    }


def _one_step(plan: Plan, exchanger: Exchanger[Tensor], oracle: Oracle, step: int, delay: Any) -> None:
    rank = exchanger.rank
    for context in [e for e in plan.exchanges if e.kind is ExchangeKind.CONTEXT]:
        exchanger.place(context.layer)  # a layer may be the first of its step to ask for anything
    for exchange in plan.exchanges[:-1]:
        if delay is not None and delay.random() < 0.3:
            time.sleep(delay.random() * 0.01)
        sent = oracle.sent(exchange, rank, step)
        place = (
            exchanger.place(exchange.layer) if exchange.kind is ExchangeKind.CONTEXT and step % 3 else None
        )
        exchanger.publish(exchange.layer, sent if place is None else [place.copy_(sent[0])])
        seen, expected = exchanger.collect(exchange.layer), oracle.seen(exchange, rank, step, exchanger.phase)
        where = f"rank {rank}: step {step}, {exchange.layer}"
        if seen is None or expected is None:
            assert seen is None, where
            assert expected is None, where
            continue
        assert len(seen) == len(expected), where
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True)), where
    output = plan.exchanges[-1]
    gathered = exchanger.gather(oracle.made(output, rank, step))
    assert all(torch.equal(t, oracle.made(output, r, step)) for r, t in enumerate(gathered)), (
        f"step {step}: output"
    )


def share_values(case: dict[str, Any], report: Any) -> list[Any]:
    """Broadcast nested values, in inference mode as pipelines run; every rank checks what it got."""
    backend = TorchBackend(toy_plan(case), timeout_s=20)
    bf16 = torch.arange(6, dtype=torch.bfloat16).view(2, 3).t()
    value = [(torch.tensor(3), bf16), {"a": None, "b": [True, 1.5, "x"], 7: torch.zeros(0, 4)}]
    with torch.inference_mode():
        got = backend.broadcast(value if backend.rank == 0 else "something else")
        for _ in range(3):
            got[0][0].add_(0)
    assert isinstance(got[0], tuple)
    assert torch.equal(got[0][1], bf16)
    assert got[0][1].dtype is torch.bfloat16
    assert got[0][0].shape == ()
    assert got[1][7].shape == (0, 4)
    refused = ""
    try:
        backend.broadcast({"model": object()})
    except Exception as error:  # noqa: BLE001 - its text is the result
        refused = str(error)
    backend.close()
    return [got[1]["a"], got[1]["b"], refused]


def policies_of_threads(case: dict[str, Any], report: Any) -> list[tuple[str, int]]:
    """Name and scheduling policy of each thread of this process, Python's own twice, once the backend is open."""
    backend = TorchBackend(toy_plan(case), device="cpu", timeout_s=10.0)
    threads = Path("/proc/self/task").iterdir()
    found = [
        ((t / "comm").read_text(encoding="utf-8").strip(), os.sched_getscheduler(int(t.name)))
        for t in threads
    ]
    own = [(t.name, os.sched_getscheduler(t.native_id or 0)) for t in threading.enumerate()]
    found += [(f"own: {name}", policy) for name, policy in own]
    backend.close()
    return found


def meet(case: dict[str, Any], report: Any) -> None:
    """Meet with a plan of one's own."""
    rank = os.environ["RANK"]
    TorchBackend(
        toy_plan({**case, **case.get(f"rank {rank}", {})}), timeout_s=case.get("timeout_s", 20)
    ).close()


def fail_in_step(case: dict[str, Any], report: Any) -> None:
    """Run the plan; one rank meets its fate at one step."""
    plan = toy_plan(case)
    backend = TorchBackend(plan, timeout_s=case.get("timeout_s", 20))
    exchanger = Exchanger(plan, backend.rank, backend.transport(backend.rank))
    oracle = Oracle(plan, 0)
    try:
        for step in range(plan.image.num_inference_steps):
            exchanger.begin_step()
            if step == case["step"] and backend.rank == case["rank"]:
                report(step)
                _meet_fate(case["fate"])
            if step == case["step"] and backend.rank == case["rank"] and case["fate"] == "stop inside":
                exchanger.publish("norm1", oracle.sent(plan.exchanges[0], backend.rank, step))
                raise ArithmeticError("not a number in conv1")
            _one_step(plan, exchanger, oracle, step, None)
    except BaseException as error:
        if case.get("aborts", True):
            backend.abort(error)
        raise
    finally:
        backend.close()


def _meet_fate(fate: str) -> None:
    if fate == "stop inside":
        return
    if fate == "raise":
        raise MemoryError("no room for conv1")
    if fate == "refuse":
        raise UserError("this cannot be drawn")
    if fate == "exit":
        os._exit(7)
    os.kill(os.getpid(), getattr(signal, fate))
    time.sleep(60)


def spawn_and_wait(case: dict[str, Any], report: Any) -> None:
    """A rank that has started a process of its own and is then interrupted or left alone."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(case["pids"] + os.environ["RANK"], "w", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(60)


def echo(case: Any, report: Any) -> Any:
    """Its argument, and where it runs."""
    report("started", os.environ["RANK"])
    return [case, os.environ["RANK"], os.environ["WORLD_SIZE"], os.getpid()]
