"""The planner's choice beside every configuration that the published implementation offers, by the simulator.

    python benchmarks/planner_vs_reference.py        (a minute on two cores)

SDXL on eight A100s, at three sizes. The published implementation offers 2, 4 or 8 devices, guidance split or not,
patches in six modes of synchronisation, patches without interaction, and tensor parallelism. Each configuration is
simulated twice: as distri would run it, which is what the planner chooses among, and with the layers and messages of
the published implementation itself (`gather_all`). Modes differ in what they do to the picture, so each is held against
the plan that is chosen under the same risk: `corrected`, `stale`, or `local`, which permits anything. The result goes
to benchmarks/results/planner_vs_reference.json and, between two marks, into docs/planner.md. Status 1 if a
configuration, as distri runs it, is faster than the chosen plan.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from distri.config.hardware import load_cluster
from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.errors import PartitionError
from distri.models.presets import load_graph
from distri.search.costs import SearchLowering
from distri.search.find import Search
from distri.search.quality import risk_of
from distri.search.request import Risk, SearchRequest
from distri.simulator.methods import Method
from distri.simulator.options import SimulationOptions
from distri.simulator.simulate import run_simulation

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "planner_vs_reference.json"
PAGE = ROOT / "docs" / "planner.md"
MARKS = ("<!-- begin planner_vs_reference -->", "<!-- end planner_vs_reference -->")
SIZES = (1024, 2048, 3840)
STEPS, WARMUP = 50, 5
MODES = {
    "corrected_async_gn": "shifted_gn",
    "stale_gn": "stale_gn",
    "sync_gn": "sync_gn",
    "full_sync": "full_sync",
    "separate_gn": "separate_gn",
    "no_sync": "no_sync",
    "naive_patch": "naive_patch",
    "tensor parallel": "full_sync",
}
"""The published names, and the tables that are served so."""
PERMITTED = {"corrected_async_gn": Risk.CORRECTED, "separate_gn": Risk.LOCAL, "no_sync": Risk.LOCAL}
"""Risks of modes by what the paper calls them: its own correction is its default."""


@dataclass(frozen=True)
class Configuration:
    """One configuration of the published implementation."""

    devices: int
    cfg_split: bool
    mode: str

    @property
    def risk(self) -> Risk:
        """The least risk that permits it, never less than the planner's default."""
        found = PERMITTED.get(self.mode) or risk_of(policy_table(MODES[self.mode]))
        return max(found, Risk.CORRECTED, key=lambda risk: risk.order)


def configurations() -> Iterator[Configuration]:
    for devices in (2, 4, 8):
        for cfg_split in (True, False):
            for mode in MODES:
                if devices > 2 or not cfg_split or mode == "full_sync":  # one patch has no mode
                    yield Configuration(devices, cfg_split, mode)


def simulated_s(
    configuration: Configuration, image: ImageRequest, lowering: SearchLowering, pattern: str
) -> float | None:
    """Seconds of one picture; None where the picture does not split this way."""
    request = PlanRequest(
        image, configuration.devices, configuration.cfg_split, policy_table(MODES[configuration.mode]), WARMUP,
        dtype="float16", pattern=pattern,
    )  # fmt: skip
    try:
        plan = make_plan(request, lowering.graph)
    except PartitionError:
        return None
    method = Method.TENSOR_PARALLEL if configuration.mode == "tensor parallel" else None
    return run_simulation(plan, lowering, method).result.latency_s


def compare(side: int) -> dict[str, Any]:
    graph, cluster = load_graph("sdxl"), load_cluster("a100-sxm")
    image = ImageRequest(side, side, STEPS)
    chosen = {}
    for risk in (Risk.CORRECTED, Risk.STALE, Risk.LOCAL):
        search = Search(graph, cluster, SearchRequest(image, 8, "float16", max_risk=risk))
        found = search.run()
        best = found.best
        table = search.sketcher.tables.of(best.serving.structure, best.serving.codec)
        chosen[risk] = {
            "layout": str(best.layout),
            "devices": best.layout.num_ranks,
            "policy": table.name,
            "latency_s": best.latency_ns / 1e9,
            "considered": found.counts.considered,
            "evaluated": found.counts.evaluated,
            "simulated": found.counts.simulated,
        }
    rows = []
    lowering = SearchLowering(graph, cluster, SimulationOptions())
    for configuration in configurations():
        latency = simulated_s(configuration, image, lowering, "neighbours")
        published = simulated_s(configuration, image, lowering, "gather_all")
        if latency is None or published is None:
            continue
        ours = chosen[configuration.risk]["latency_s"]
        rows.append(
            {
                "devices": configuration.devices,
                "guidance_split": configuration.cfg_split,
                "mode": configuration.mode,
                "risk": configuration.risk.value,
                "latency_s": latency,
                "published_layers_s": published,
                "chosen_s": ours,
                "times_faster": latency / ours,
            }
        )
        print(f"{side}: {configuration} {latency:.3f} s ({published:.3f} s), chosen {ours:.3f} s", flush=True)
    return {"size": side, "chosen": {risk.value: value for risk, value in chosen.items()}, "rows": rows}


def page_of(results: list[dict[str, Any]]) -> str:
    """The tables of the page."""
    lines = []
    for result in results:
        lines += [
            f"**{result['size']}x{result['size']}**",
            "",
            "| permitted risk | chosen | policy | latency |",
            "| --- | --- | --- | --- |",
        ]
        for risk, value in result["chosen"].items():
            lines.append(f"| {risk} | {value['layout']} | {value['policy']} | {value['latency_s']:.3f} s |")
        lines += [
            "",
            "| mode | 2 devices | 4 devices | 8 devices | chosen | faster by | published layers, best |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for mode in MODES:
            rows = [row for row in result["rows"] if row["mode"] == mode]
            if not rows:
                continue
            cells = []
            for devices in (2, 4, 8):
                found = [row for row in rows if row["devices"] == devices]
                best = min(found, key=lambda row: row["latency_s"], default=None)
                split = "" if best is None else " (guidance split)" if best["guidance_split"] else ""
                cells.append("-" if best is None else f"{best['latency_s']:.3f} s{split}")
            least = min(row["times_faster"] for row in rows)
            other = min(row["published_layers_s"] for row in rows)
            lines.append(
                f"| {mode} | {' | '.join(cells)} | {rows[0]['chosen_s']:.3f} s | {least:.3f} times "
                f"| {other:.3f} s |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--page", action="store_true", help="only write the page again, from the result")
    options = parser.parse_args()
    if options.page:
        results = json.loads(RESULT.read_text(encoding="utf-8"))["sizes"]
    else:
        results = [compare(side) for side in options.sizes]
    body = {"command": "python benchmarks/planner_vs_reference.py", "model": "sdxl", "hardware": "a100-sxm",
            "steps": STEPS, "warmup_steps": WARMUP, "sizes": results}  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    if PAGE.is_file():
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{page_of(results)}\n{MARKS[1]}{after}", encoding="utf-8")
    worst = min(row["times_faster"] for result in results for row in result["rows"])
    print(f"the chosen plan is at least {worst:.3f} times as fast as every configuration of its risk")
    return 0 if worst >= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
