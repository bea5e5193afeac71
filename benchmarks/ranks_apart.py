"""How far apart the pictures of two, four and eight ranks are, and how sure that is: from `distri evaluate --json`.

    python benchmarks/ranks_apart.py                     (draws; three hours on one core)
    python benchmarks/ranks_apart.py --from a.json b.json   (reads what `distri evaluate --json` printed)

Every sentence and seed is drawn on all numbers of ranks from the same noise, so distances are taken picture by picture;
what is printed is their mean and its standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.quality_table import evaluated
from distri.evaluation import standard_error

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "ranks_apart.json"
SIZES = ("256x256", "512x256", "512x512")
RANKS = (2, 4, 8)

Setting = tuple[str, str, int]
"""Size (height x width), mode, steps of warm-up."""
Drawn = dict[tuple[str, int], dict[int, float]]
"""PSNR by (sentence, seed) and number of ranks."""


def drawn_at(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `distri evaluate` finds at one size."""
    height, width = size.split("x")
    return evaluated(
        modes=options.modes,
        height=height,
        width=width,
        seeds=options.seeds,
        num_prompts=options.num_prompts,
        ranks=",".join(map(str, RANKS)),
    )


def by_setting(evaluations: Iterable[dict[str, Any]]) -> dict[Setting, Drawn]:
    """All pictures of all evaluations."""
    found: dict[Setting, Drawn] = {}
    for evaluation in evaluations:
        request = evaluation["request"]
        size = f"{request['height']}x{request['width']}"
        for picture in evaluation["pictures"]:
            drawn = found.setdefault((size, picture["mode"], request["warmup_steps"]), {})
            drawn.setdefault((picture["prompt"], picture["seed"]), {})[picture["ranks"]] = picture["psnr_db"]
    return found


def row_of(setting: Setting, drawn: Drawn) -> dict[str, Any]:
    """Means over the pictures, and the distance between the fewest and the most ranks."""
    size, mode, warmup_steps = setting
    apart = {key: psnr[RANKS[0]] - psnr[RANKS[-1]] for key, psnr in drawn.items()}
    error_db = standard_error(list(apart.values()))
    seeds = sorted({seed for _, seed in drawn})
    height, width = size.split("x")
    return {
        "command": f"distri evaluate --json --modes {mode} --height {height} --width {width} --seeds "
        f"{','.join(map(str, seeds))} --num-prompts {len({prompt for prompt, _ in drawn})} "
        f"--warmup-steps {warmup_steps}",
        "size": size,
        "mode": mode,
        "warmup_steps": warmup_steps,
        "num_pictures": len(drawn),
        "psnr_db": {ranks: round(fmean(psnr[ranks] for psnr in drawn.values()), 3) for ranks in RANKS},
        "apart_db": round(fmean(apart.values()), 2),
        "apart_error_db": None if error_db is None else round(error_db, 2),
        "apart_by_seed_db": {
            seed: round(fmean(far for (_, other), far in apart.items() if other == seed), 2) for seed in seeds
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="sources", type=Path, nargs="+", help="what `distri evaluate --json` printed"
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="height x width")
    parser.add_argument("--modes", default="corrected")
    parser.add_argument("--seeds", default="0,1,2,3")
    parser.add_argument("--num-prompts", type=int, default=10)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    options = parser.parse_args()
    evaluations = (
        [json.loads(path.read_text(encoding="utf-8")) for path in options.sources]
        if options.sources
        else [drawn_at(size, options) for size in options.sizes]
    )
    rows = [row_of(setting, drawn) for setting, drawn in sorted(by_setting(evaluations).items())]
    for row in rows:
        psnr = " / ".join(f"{value:.1f}" for value in row["psnr_db"].values())
        seeds = ", ".join(f"{seed}: {value:.1f}" for seed, value in row["apart_by_seed_db"].items())
        print(
            f"{row['size']} {row['mode']}, warm-up {row['warmup_steps']}: {psnr} dB on 2 / 4 / 8 ranks over "
            f"{row['num_pictures']} pictures, {row['apart_db']:.1f} +- {row['apart_error_db'] or 0:.1f} dB apart "
            f"(by seed {seeds})"
        )
    result = {
        "what": "PSNR against the single device's picture, demo model, 50 DDIM steps; distance of 2 and 8 ranks",
        "command": "python benchmarks/ranks_apart.py",
        "device": "CPU, in process",
        "date": date.today().isoformat(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
