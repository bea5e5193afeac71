"""The table of what plans do to the picture, as the planner reads it: from `distri evaluate --json`.

    python benchmarks/quality_table.py                     (draws; an hour on two cores)
    python benchmarks/quality_table.py --from a.json b.json   (reads what `distri evaluate --json` printed)

Writes distri/search/data/quality.json: one row for each policy table, number of patches and length of the warm-up, with
the mean PSNR against the single device's picture from the same noise. `distri plan --min-psnr` reads nothing else. The
rows of the shortest warm-up go into docs/policies.md too, between two marks, with the bytes that each table sends.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.models.presets import load_graph

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "policies.md"
MARKS = ("<!-- begin quality -->\n", "<!-- end quality -->")
TARGET = ROOT / "distri" / "search" / "data" / "quality.json"
SCHEMA = 1
ABOUT = (
    "PSNR of a plan's picture against the single device's, same noise, demo model. One row for each policy table, "
    "number of patches, warm-up steps and steps; written by benchmarks/quality_table.py."
)
TABLES = (
    "corrected,extrapolated_gn,shifted_gn,sync_gn,separate_gn,no_sync,local,extrapolated,partial,"
    "int8,fp8,residual_int4,residual_int2,extrapolated_residual_int2"
)
WARMUPS = (5, 8, 15)


def evaluated(**flags: object) -> dict[str, Any]:
    """One run of `distri evaluate` with these flags."""
    command = [sys.executable, "-m", "distri", "evaluate", "--json"]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows_of(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The planner's rows of one evaluation; columns and other samplers than the first are left out."""
    request = evaluation["request"]
    sampler = request["samplers"][0]
    pictures = len(request["prompts"]) * len(request["seeds"])
    return [
        {
            "policy": row["mode"],
            "patches": row["ranks"],
            "warmup_steps": request["warmup_steps"],
            "num_inference_steps": row["steps"],
            "psnr_db": round(row["psnr_db"], 2),
            "num_pictures": pictures,
        }
        for row in evaluation["rows"]
        if row["sampler"] == sampler and "@" not in row["mode"] and row["psnr_db"] is not None
    ]


def half_bytes(policy: str, patches: int, height: int, width: int) -> int:
    """Bytes that a rank receives in a steady step, at most, in float16, guidance on and not split."""
    request = PlanRequest(
        ImageRequest(height, width, 50), patches, False, policy_table(policy), 5, dtype="float16"
    )
    return max(make_plan(request, load_graph("demo")).bytes_received_per_step)


def page_of(rows: list[dict[str, Any]], request: dict[str, Any]) -> str:
    """The rows of the shortest warm-up as Markdown, best first."""
    warmup = min(row["warmup_steps"] for row in rows)
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["warmup_steps"] == warmup:
            found.setdefault(row["policy"], {})[row["patches"]] = row["psnr_db"]
    counts = sorted({patches for by_count in found.values() for patches in by_count})
    most = counts[-1]
    size = (request["height"], request["width"])
    whole = half_bytes("corrected", most, *size)
    numbers = sorted({row["num_pictures"] for row in rows})
    pictures = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    lines = [
        f"Demo model, {size[1]}x{size[0]}, 50 DDIM steps, {warmup} of them warm-up, {pictures} held-out sentences:",
        "PSNR in dB against the single device's picture from the same noise, and bytes that a rank receives in a",
        f"steady step, at most, of {most} in float16, beside those of `corrected`.",
        "",
        "| table | " + " | ".join(f"{count} ranks" for count in counts) + " | bytes |",
        "| --- | " + "--- | " * len(counts) + "--- |",
    ]
    for policy, by_count in sorted(found.items(), key=lambda item: -sum(item[1].values())):
        cells = [f"{by_count[count]:.1f}" if count in by_count else "" for count in counts]
        share = half_bytes(policy, most, *size) / whole
        lines.append(f"| `{policy}` | " + " | ".join(cells) + f" | {share:.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="sources", type=Path, nargs="+", help="what `distri evaluate --json` printed"
    )
    parser.add_argument("--num-prompts", type=int, default=10)
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--warmups", type=int, nargs="+", default=list(WARMUPS))
    options = parser.parse_args()
    if options.sources:
        evaluations = [json.loads(path.read_text(encoding="utf-8")) for path in options.sources]
    else:
        prompts, ranks = options.num_prompts, options.ranks
        evaluations = [
            evaluated(modes=TABLES, ranks=ranks, steps=50, warmup_steps=warmup, num_prompts=prompts)
            for warmup in options.warmups
        ]
    rows = [row for evaluation in evaluations for row in rows_of(evaluation)]
    rows.sort(key=lambda row: (row["policy"], row["warmup_steps"], row["patches"]))
    command = f"python benchmarks/quality_table.py --num-prompts {options.num_prompts}"
    if options.sources:
        command = "; ".join(
            "distri evaluate --json --num-prompts {} --ranks {} --modes {}".format(
                len(request["prompts"]), ",".join(map(str, request["ranks"])), ",".join(request["modes"])
            )
            for request in (evaluation["request"] for evaluation in evaluations)
        )
    body = {
        "schema": SCHEMA,
        "about": ABOUT,
        "provenance": {"command": command, "date": date.today().isoformat(), "model": "demo"},
    }
    head = json.dumps(body, indent=1)[:-2]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    TARGET.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    table = page_of(rows, evaluations[0]["request"])
    PAGE.write_text(before + MARKS[0] + table + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")
    print(f"{len(rows)} rows; {TARGET.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
