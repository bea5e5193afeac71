"""What would change the answer: other links, another size. Estimates of tier 2, over the plans that were shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from distri.core.plan import ImageRequest
from distri.search.costs import Bounder, ShardTimes
from distri.search.find import Search
from distri.search.runners import Runner
from distri.search.sketch import Sketcher
from distri.simulator.hardware import LinkKind
from distri.simulator.longest_path import longest_path_ns
from distri.simulator.tasks import Call, Post, StepTemplate, TaskList, Transfer

PCIE_BYTES_PER_S: Final = 25e9
"""What one PCIe 4.0 x16 port gives in practice."""
SLOWEST: Final = 1e-3
NARROWEST_PIXELS: Final = 64


@dataclass(frozen=True)
class WhatIf:
    """One sentence, and the figure in it where it has one (bytes per second, or pixels)."""

    sentence: str
    figure: float | None = None


def what_ifs(search: Search, best: Runner, others: Sequence[Runner]) -> tuple[WhatIf, ...]:
    """Slower links, and smaller pictures, where more than one device is best; faster ones, where one is."""
    found = []
    fitting = [runner for runner in others if not runner.why.startswith("memory")]
    if best.layout.num_ranks > 1:
        links = _Links(search, [best, *fitting])
        found += links.slower()
    found += _sizes(search, best, fitting)
    return tuple(found)


class _Links:
    """The shown plans with links at a share of their rate."""

    def __init__(self, search: Search, runners: Sequence[Runner]) -> None:
        self.search = search
        self.runners = _challengers(runners)
        self.tasks = [
            search.bounder(r.layout).lowering.lower(search.sketcher.sketch(r.layout, r.serving))
            for r in self.runners
        ]
        widest = max(
            (link.bandwidth_bytes_per_s.value for link in search.cluster.links if link.kind in _FAST),
            default=0.0,
        )
        self.rate = widest or max(link.bandwidth_bytes_per_s.value for link in search.cluster.links)
        self.is_nvlink = widest > 0

    def best_at(self, share: float) -> int:
        """The place of the best plan with links at a share of their rate; the chosen one among equals."""
        values = []
        for runner, tasks in zip(self.runners, self.tasks, strict=True):
            ns = longest_path_ns(with_links(tasks, share))
            values.append(self.search.score(runner.layout, None, self.search.value(runner.layout, ns)))
        return min(range(len(values)), key=lambda place: (values[place], place))

    def slower(self) -> list[WhatIf]:
        found = []
        if self.is_nvlink and self.rate > PCIE_BYTES_PER_S:
            place = self.best_at(PCIE_BYTES_PER_S / self.rate)
            verb = "stays best" if place == 0 else "is best"
            found.append(WhatIf(f"with PCIe instead of NVLink: {_name(self.runners[place])} {verb}"))
        if self.best_at(SLOWEST) == 0:
            return [*found, WhatIf("no slower link changes the answer")]
        low, high = SLOWEST, 1.0
        for _ in range(7):
            middle = (low * high) ** 0.5
            if self.best_at(middle) == 0:
                high = middle
            else:
                low = middle
        rate = high * self.rate
        other = _name(self.runners[self.best_at(low)])
        return [
            *found,
            WhatIf(f"break-even bandwidth: below {rate / 1e9:.3g} GB/s a link, {other} is best", rate),
        ]


def _challengers(runners: Sequence[Runner]) -> list[Runner]:
    """The chosen plan, and the best one on each smaller number of devices."""
    found = {runners[0].layout.num_ranks: runners[0]}
    for runner in runners[1:]:
        if runner.layout.num_ranks < runners[0].layout.num_ranks:
            found.setdefault(runner.layout.num_ranks, runner)
    return list(found.values())


_FAST = (LinkKind.NVLINK,)


def _name(runner: Runner) -> str:
    count = runner.layout.num_ranks
    if count == 1:
        return "1 device"
    policy = f", {runner.policy}" if runner.layout.patches > 1 else ""
    return f"{count} devices ({runner.layout}{policy})"


def with_links(tasks: TaskList, share: float) -> TaskList:
    """The same tasks, bytes moving at a share of their rate; latencies stay."""
    calls: dict[int, Call] = {}

    def slower(transfer: Transfer) -> Transfer:
        moving = transfer.alone_ns - transfer.latency_ns
        return transfer._replace(alone_ns=transfer.latency_ns + round(moving / share))

    def of(call: Call) -> Call:
        if id(call) not in calls:
            groups = tuple(group._replace(transfer=slower(group.transfer)) for group in call.groups)
            hops = tuple(hop._replace(transfer=slower(hop.transfer)) for hop in call.hops)
            calls[id(call)] = dataclasses.replace(call, groups=groups, hops=hops)
        return calls[id(call)]

    def template(old: StepTemplate) -> StepTemplate:
        actions = tuple(
            action._replace(call=of(action.call)) if isinstance(action, Post) else action
            for action in old.actions
        )
        return StepTemplate(old.name, actions, old.is_closed)

    return dataclasses.replace(tasks, templates=tuple(template(old) for old in tasks.templates))


def _sizes(search: Search, best: Runner, others: Sequence[Runner]) -> list[WhatIf]:
    """The side of the square picture at which one device and several change places."""
    graph, request = search.graph, search.request
    alone = next((r for r in (best, *others) if r.layout.num_ranks == 1), None)
    several = best if best.layout.num_ranks > 1 else next(iter(others), None)
    if alone is None or several is None:
        return []
    step = max(NARROWEST_PIXELS, graph.alignment[0] * graph.vae_factor * max(several.layout.grid))
    gains = _gain(search, several, alone)
    now = max(1, round((request.image.height * request.image.width) ** 0.5 / step))
    count = several.layout.num_ranks
    if best is several:
        if gains(step) > 0:
            return [WhatIf(f"{count} devices win down to {step}x{step}, the smallest that this layout cuts")]
        low, high = 1, max(2, now)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if gains(middle * step) > 0 else (middle, high)
        side = high * step
        return [WhatIf(f"break-even resolution: below about {side}x{side}, 1 device is best", side)]
    low, high = now, now
    while high * step < 8192 and gains(high * step) <= 0:
        low, high = high, 2 * high
    if gains(high * step) <= 0:
        return [WhatIf(f"no size up to {high * step} pixels makes {count} devices faster than 1 here")]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gains(middle * step) > 0 else (middle, high)
    side = high * step
    return [
        WhatIf(f"break-even resolution: from about {side}x{side}, {count} devices are faster than 1", side)
    ]


def _gain(search: Search, several: Runner, alone: Runner) -> Callable[[int], float]:
    """By side in pixels: how much the objective prefers several devices to one, by closed forms."""
    known: dict[int, float] = {}

    def gain(side: int) -> float:
        if side not in known:
            image = ImageRequest(
                side, side, search.request.image.num_inference_steps, search.request.image.guidance
            )
            sketcher = Sketcher(search.graph, image, search.request.dtype)
            values = []
            for runner in (alone, several):
                lowering = search.bounder(runner.layout).lowering
                bounder = Bounder(
                    sketcher, lowering, ShardTimes(sketcher, lowering.table(search.request.dtype))
                )
                even = dataclasses.replace(runner.layout, units=None)
                ns = bounder.bound_ns(even, runner.serving, has_traffic=True)
                values.append(search.value(runner.layout, ns))
            known[side] = values[0] - values[1]
        return known[side]

    return gain
