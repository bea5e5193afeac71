"""The planner's choice held against measurements: one rank, guidance split or patches, behind links of several rates.

    python benchmarks/planner_choice.py        (as root, on Linux; half an hour)

The demo model at two sizes on two ranks in network namespaces of their own. For each rate the layers and the links are
profiled as in benchmarks/reality.py, the planner picks among {1 rank, guidance split, 2 rows}, and all three are
measured. The choice must be the measured best or within five percent of it. Written to
benchmarks/results/planner_choice.json; where namespaces are not allowed, the reason is printed and the status is 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import reality
from benchmarks.namespaces import Network, is_available
from distri.config.profile import Profile, load_profile
from distri.core.partition import SplitAxis
from distri.core.plan import ImageRequest, Plan
from distri.models.presets import load_graph
from distri.profiler.measure import device_name
from distri.search.find import Search
from distri.search.request import Limits, SearchRequest
from distri.search.space import Layout, Serving
from distri.simulator.compute import AnalyticCompute
from distri.simulator.costs import ComputeFactory
from distri.simulator.hardware import Cluster
from distri.simulator.measured import MeasuredOperations
from distri.simulator.simulate import simulate

RESULT = reality.ROOT / "benchmarks" / "results" / "planner_choice.json"
SIDES = (256, 512)
RATES = (None, 200 * reality.MEGABIT, 50 * reality.MEGABIT, 10 * reality.MEGABIT)
STEPS, WARMUP = 12, 3
WITHIN = 0.05
LIMITS = Limits(
    axes=(SplitAxis.ROWS,), warmup_steps=(WARMUP,), layers_per_bucket=(60,), has_deep_rules=False,
    has_uneven_bands=False, tolerance=0.0,
)  # fmt: skip


def profile_layers(side: int, folder: Path) -> Profile:
    """Layer times of one rank alone on its core, and of two beside each other."""
    path = folder / f"profile{side}.json"
    command = [
        sys.executable, "-m", "distri", "profile", "--model", "demo", "--height", str(side), "--width", str(side),
        "--gpus", "1", "--gpus", "2", "--beside", "2", "-o", str(path),
    ]  # fmt: skip
    with Network(2, None) as network:
        reality.on_ranks(network, command)
    return load_profile(path)


def candidates(search: Search) -> dict[str, tuple[Layout, Serving]]:
    """The three plans, by name."""
    plain = Serving(search._structures[0], WARMUP)
    return {str(layout): (layout, plain) for layout in search.layouts()}


def predict(plan: Plan, cluster: Cluster, compute: ComputeFactory) -> float:
    return simulate(plan, load_graph("demo"), cluster, compute=compute).latency_s


def case(side: int, rate: int | None, profile: Profile, images: int, folder: Path) -> dict[str, Any]:
    """One size behind one rate: predict all, choose, measure all."""

    def compute(device: Any, launch: Any) -> MeasuredOperations:
        return MeasuredOperations(profile.measurements, AnalyticCompute(device, launch))

    with Network(2, rate) as network:
        cluster = reality.probe(network, folder)
        request = SearchRequest(ImageRequest(side, side, STEPS), 2, "float32", limits=LIMITS)
        search = Search(load_graph("demo"), cluster, request, compute=compute)
        chosen = str(search.run().best.layout)
        rows = {}
        for name, (layout, serving) in candidates(search).items():
            plan = search.sketcher.plan(layout, serving)
            ends = reality.measure(_of_size(network, plan), plan, images)
            rows[name] = {
                "predicted_s": predict(plan, cluster, compute),
                "measured_s": statistics.median(image[-1] for image in ends),
                "readings_s": [image[-1] for image in ends],
            }
    best = min(row["measured_s"] for row in rows.values())
    loss = rows[chosen]["measured_s"] / best - 1
    print(f"{side}, {rate}: chosen {chosen}, {loss:+.1%} from the measured best; {rows}", flush=True)
    return {"side": side, "rate_bits_per_s": rate, "chosen": chosen, "loss": loss, "plans": rows}


def _of_size(network: Network, plan: Plan) -> Network:
    """The same namespaces, as many as the plan has ranks."""
    return dataclasses.replace(network, num_ranks=plan.mesh.size)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))
    parser.add_argument("--rates", type=int, nargs="+", default=None, help="Mb/s; 0 for no limit")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not is_available():
        return 0
    rates = RATES if options.rates is None else [rate * reality.MEGABIT or None for rate in options.rates]
    cases = []
    with tempfile.TemporaryDirectory() as name:
        for side in options.sides:
            profile = profile_layers(side, Path(name))
            cases += [case(side, rate, profile, options.images, Path(name)) for rate in rates]
    worst = max(found["loss"] for found in cases)
    body = {
        "what": "the planner's choice among 1 rank, guidance split and 2 rows, held against all three measured",
        "command": f"python benchmarks/planner_choice.py --images {options.images}",
        "device": device_name(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "worst_loss": worst,
        "cases": cases,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(f"the choice is within {worst:.1%} of the measured best in all {len(cases)} cases")
    return 0 if worst <= WITHIN else 1


if __name__ == "__main__":
    sys.exit(main())
