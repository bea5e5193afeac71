"""A search's answer as plain JSON values: what is kept, printed, drawn and compared.

The plan is the planner's own, sealed with its hash. `search` beside it says what was predicted, what else was looked at
and why it lost; it is commentary, and the plan's hash does not cover it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from distri.core.plan import Plan
from distri.search.find import Search, SearchResult
from distri.search.pareto import pareto
from distri.search.quality import risk_of
from distri.search.runners import Runner, Runners
from distri.search.uneven import gather_costs
from distri.search.whatif import what_ifs
from distri.simulator.memory import MemoryUse

ANSWER_SCHEMA = 1


def make_answer(
    search: Search, result: SearchResult, has_pareto: bool = False
) -> tuple[Plan, dict[str, Any]]:
    """The chosen plan, and all that is to be said about it; the curve over numbers of devices if asked for."""
    best = result.best
    plan = search.sketcher.plan(best.layout, best.serving)
    runners = Runners(search, result)
    others = runners.found()
    chosen = runners.best
    one_s = _one_device_s(runners, others)
    answer = {
        "schema": ANSWER_SCHEMA,
        "plan": plan.hash,
        "hardware": search.cluster.name,
        "title": search.cluster.title,
        "objective": search.request.objective.value,
        "num_images": search.request.num_images,
        "offered": search.request.num_devices,
        "devices": list(best.layout.devices),
        "device_models": [search.cluster.devices[rank].model for rank in best.layout.devices],
        "layout": str(best.layout),
        "policy": plan.policy.name,
        "risk": risk_of(plan.policy).value if plan.mesh.patch > 1 else "fresh",
        "psnr_db": _psnr(search, chosen),
        "prediction": {
            **asdict(chosen.breakdown),
            "one_device_s": one_s,
            "speedup": one_s / chosen.breakdown.latency_s,
            "value": best.value,
            "device_seconds": chosen.breakdown.latency_s * plan.mesh.size,
            "price": _price(search, chosen),
        },
        "memory": [_memory(search, use) for use in best.memory],
        "counts": {**asdict(result.counts), "bounded_away": result.counts.bounded_away},
        "gap": result.gap,
        "one_device_is_best": plan.mesh.size == 1 and search.request.num_devices > 1,
        "runners_up": [_runner(runner) for runner in others],
        "left_out": left_out(search, result, others, chosen),
        "bands": _bands(search, result),
        "pareto": [asdict(point) for point in pareto(search, runners)] if has_pareto else [],
        "what_if": [asdict(found) for found in what_ifs(search, chosen, others)],
    }
    return plan, answer


def _one_device_s(runners: Runners, others: tuple[Runner, ...]) -> float:
    alone = [r.breakdown.latency_s for r in (runners.best, *others) if r.layout.num_ranks == 1]
    if alone:
        return min(alone)
    return runners.one_device().breakdown.latency_s


def _psnr(search: Search, runner: Runner) -> float | None:
    if runner.layout.patches == 1:
        return None
    name = search.sketcher.tables.measured_name(runner.serving.structure, runner.serving.codec)
    steps = search.request.image.num_inference_steps
    return search.quality.psnr_db(name, runner.layout.patches, runner.serving.warmup_steps, steps)


def _price(search: Search, runner: Runner) -> float | None:
    price = search.request.price_per_hour
    if price is None:
        return None
    return runner.breakdown.latency_s * runner.layout.num_ranks * price / 3600


def _memory(search: Search, use: MemoryUse) -> dict[str, Any]:
    return {**asdict(use), "total": use.total, "limit": search.memory.limit_of(use)}


def _runner(runner: Runner) -> dict[str, Any]:
    return {
        "layout": str(runner.layout),
        "devices": runner.layout.num_ranks,
        "policy": runner.policy,
        "warmup_steps": runner.serving.warmup_steps,
        "latency_s": runner.breakdown.latency_s,
        "exposed_s": runner.breakdown.exposed_s,
        "value": runner.value,
        "memory_bytes": runner.memory_bytes,
        "why": runner.why,
    }


def left_out(
    search: Search, result: SearchResult, others: tuple[Runner, ...], chosen: Runner
) -> list[dict[str, Any]]:
    """Devices that were offered and are not used, each with the reason."""
    used = set(result.best.layout.devices)
    down = set(search.request.down)
    found = []
    for rank in range(search.request.num_devices):
        if rank in down:
            found.append({"device": rank, "why": "listed as down"})
        elif rank not in used:
            found.append({"device": rank, "why": _why_left(search, result, rank, others, chosen)})
    return found


def _why_left(
    search: Search, result: SearchResult, rank: int, others: tuple[Runner, ...], chosen: Runner
) -> str:
    slowest = min(search.speed(search.cluster.devices[r].model) for r in result.best.layout.devices)
    speed = search.speed(search.cluster.devices[rank].model)
    with_it = [r for r in others if rank in r.layout.devices]
    beside = min((r.breakdown.latency_s for r in with_it), default=None)
    took = "" if beside is None else f": with it {beside:.2f} s, without {chosen.breakdown.latency_s:.2f} s"
    if speed < 0.99 * slowest:
        return f"{speed / slowest:.0%} of the speed of the others; it would hold them up{took}"
    return f"more devices are not better here{took}"


def _bands(search: Search, result: SearchResult) -> dict[str, Any] | None:
    """How the chosen bands were solved, if they are uneven, and what their gathers cost either way."""
    layout = result.best.layout
    solved = result.bands.get(layout)
    if solved is None:
        return None
    ranks = tuple(range(layout.patches))
    tokens = [count * 2**20 for count in solved.units]
    gathers = gather_costs(search.bounder(layout).lowering.collectives, ranks, tokens)
    return {
        **asdict(solved),
        "gap": solved.gap,
        "share_of_ideal": solved.share_of_ideal,
        "even_share_of_ideal": solved.even_share_of_ideal,
        "gather": gathers.best,
        "padded_s": gathers.padded_s,
        "messages_s": gathers.messages_s,
    }
