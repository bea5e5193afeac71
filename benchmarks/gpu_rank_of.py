"""SDXL with random weights on one GPU: one rank of a plan at a time, its exchanges served from memory.

    python benchmarks/gpu_rank_of.py [--sides 1024,2048] [--ranks 1,2,4,8]

Writes benchmarks/results/gpu_rank_of.json: seconds of a steady step, efficiency against 1/N, kernels that a step
launches, and the step as a CUDA graph. Without a GPU it says so and ends with status 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

RESULT = Path(__file__).parent / "results" / "gpu_rank_of.json"


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default="1024,2048", help="sides of square images")
    parser.add_argument("--ranks", default="1,2,4,8", help="numbers of ranks")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: there is no GPU here")
        return 0
    from distri.bench.one_rank import OneRankRequest, measure_one_rank

    rows = []
    for side in map(int, options.sides.split(",")):
        for ranks in map(int, options.ranks.split(",")):
            for cfg_split in (False, True) if ranks % 2 == 0 else (False,):
                request = OneRankRequest(
                    "sdxl", side, side, ranks, 0, options.rounds, options.dtype, cfg_split=cfg_split
                )
                result = measure_one_rank(request)
                rows.append({**dataclasses.asdict(request), **dataclasses.asdict(result)})
                print(json.dumps(rows[-1]), flush=True)
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    report = {
        "what": "one rank of an SDXL plan alone on one GPU, exchanges served from its memory; medians of a steady step",
        "command": "python benchmarks/gpu_rank_of.py",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": str(torch.__version__),
        "rows": rows,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
