"""`distri plan --diff`: what two plans do differently, and what their searches predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distri.cli.output import print_json
from distri.cli.render import console, scaled, table
from distri.config.plan import COMMENTARY, load_plan
from distri.core.plan import Plan


def show_difference(first: Path, second: Path, as_json: bool) -> None:
    """Print where two plans differ.

    Raises:
        PlanError: one of them is no sound plan.
    """
    plans = [load_plan(path) for path in (first, second)]
    said = [json.loads(path.read_text(encoding="utf-8")).get(COMMENTARY) for path in (first, second)]
    ours, theirs = (facts(plan, search) for plan, search in zip(plans, said, strict=True))
    different = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
    if as_json:
        print_json({"same": not different, "different": {k: list(v) for k, v in different.items()}})
        return
    if not different:
        console().print("the two plans are the same", soft_wrap=True)
        return
    made = table("What differs", "what", str(first), str(second))
    for name, (left, right) in different.items():
        made.add_row(name, left, right)
    console().print(made)


def facts(plan: Plan, search: dict[str, Any] | None) -> dict[str, str]:
    """A plan in words, one line a fact."""
    image, mesh = plan.image, plan.mesh
    patches = [patch for turn in plan.partition.turns for patch in turn]
    found = {
        "model": plan.model.name,
        "picture": f"{image.height}x{image.width}, {image.num_inference_steps} steps",
        "guidance": "on" if image.guidance else "off",
        "dtype": plan.dtype,
        "mesh": f"{mesh.cfg} x {mesh.patch}",
        "split": plan.partition.axis.value,
        "rows of the patches": ", ".join(f"{p.rows.start}-{p.rows.stop}" for p in patches),
        "columns of the patches": ", ".join(f"{p.cols.start}-{p.cols.stop}" for p in patches),
        "policy": plan.policy.name,
        "warm-up": f"{plan.warmup_steps} steps",
        "refresh": "-" if plan.refresh is None else str(plan.refresh),
        "buckets": str(plan.num_buckets),
        "fresh exchanges in a steady step": str(sum(e.steady.value == "fresh" for e in plan.exchanges)),
        "MACs of the busiest rank": scaled(max(plan.macs_per_device)),
        "received per step, at most": scaled(max(plan.bytes_received_per_step), "B"),
        "hash": plan.hash[:12],
    }
    prediction = (search or {}).get("prediction")
    if isinstance(prediction, dict):
        found["predicted latency"] = f"{prediction['latency_s']:.3f} s on {(search or {})['hardware']}"
        found["waiting for transfers"] = f"{prediction['exposed_s']:.3f} s"
    else:
        found["predicted latency"] = found["waiting for transfers"] = "not searched"
    return found
