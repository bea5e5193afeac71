"""What a rank receives in a steady step of SDXL, by kind of exchange, beside the reference's pattern.

    python benchmarks/bytes.py [--markdown]

Counted from plans, not measured; `distri bench` measures the same on a run. The reference (DistriFusion, section 4)
lets every rank gather every value: for keys and values that is what attention needs; for halos and moments it is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import ExchangeKind, policy_table
from distri.core.traffic import messages_of
from distri.models.presets import load_graph

RESULT = Path(__file__).parent / "results" / "bytes.json"
PAPER_ELEMENTS = 0.42e9
KINDS = (ExchangeKind.CONTEXT, ExchangeKind.HALO, ExchangeKind.MOMENTS, ExchangeKind.OUTPUT)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="print the table of the docs")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    graph = load_graph("sdxl")
    rows = [row_of(plan_of(graph, ranks, cfg)) for ranks in (2, 4, 8) for cfg in (False, True)]
    rows = [row for row in rows if row["patches"] > 1]
    result = {
        "what": "elements that the rank which receives most receives in a steady step, SDXL, 1024x1024, guidance on",
        "command": "python benchmarks/bytes.py",
        "paper_elements": PAPER_ELEMENTS,
        "rows": rows,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(rows) if options.markdown else json.dumps(result, indent=1))
    return 0


def plan_of(graph: Any, ranks: int, cfg_split: bool) -> Plan:
    image = ImageRequest(1024, 1024, 50)
    return make_plan(
        PlanRequest(image, ranks, cfg_split, policy_table("corrected"), 4, dtype="float16"), graph
    )


def row_of(plan: Plan) -> dict[str, Any]:
    """Elements by kind, of the patch that receives most; and what gathering everything would bring it."""
    received = {kind.value: 0 for kind in KINDS}
    busiest = max(
        range(plan.mesh.patch), key=lambda patch: sum(e.elements_received[patch] for e in plan.exchanges)
    )
    for exchange in plan.exchanges:
        received[exchange.kind.value] += exchange.elements_received[busiest]
    return {
        "ranks": plan.mesh.size,
        "patches": plan.mesh.patch,
        "cfg_split": plan.mesh.cfg == 2,
        "elements": received,
        "total": sum(received.values()),
        "gather_all_total": gathered(plan),
    }


def gathered(plan: Plan) -> int:
    """The reference's pattern: each patch publishes both edges, its moments, and its keys and values, to all others."""
    total, others = 0, plan.mesh.patch - 1
    for exchange in plan.exchanges:
        if exchange.kind is ExchangeKind.HALO:
            found = messages_of(exchange, plan.partition.patches)
            total += others * 2 * max(message.elements for message in found)
        elif exchange.kind is ExchangeKind.MOMENTS:
            batch, groups, _ = exchange.shape
            total += others * batch * groups * 2  # mean and mean of squares
        else:
            total += max(exchange.elements_received)
    return total


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| ranks | patches x guidance | keys and values | halos | moments | output | together | gathered by all |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        e = row["elements"]
        split = f"{row['patches']} x {2 if row['cfg_split'] else 1}"
        values = [e["context"], e["halo"], e["moments"], e["output"], row["total"], row["gather_all_total"]]
        lines.append(
            f"| {row['ranks']} | {split} | " + " | ".join(f"{value / 1e6:.3f} M" for value in values) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
