"""Decoding in patches beside decoding on rank 0 alone, in turn, in the same processes: the demo model's, on gloo.

    python benchmarks/decode.py [--side 1024] [--gpus 2] [--rounds 9]

Writes benchmarks/results/decode.json: medians, and the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from distri.launch import run_ranks

RESULT = Path(__file__).parent / "results" / "decode.json"


def measure_as_rank(arguments: dict[str, Any], report: Any) -> dict[str, Any]:
    """One rank's part: rank 0 decodes alone, then all decode together."""
    import torch
    import torch.distributed as dist

    from distri.core.plan import ImageRequest
    from distri.core.planner import PlanRequest, make_plan
    from distri.decoding import PatchDecoder
    from distri.models.load import load_pipeline
    from distri.models.presets import load_graph
    from distri.pipeline import open_backend
    from distri.profiler.measure import device_name

    side, ranks = arguments["side"], arguments["ranks"]
    plan = make_plan(PlanRequest(ImageRequest(side, side, 2), ranks, dtype="float32"), load_graph("demo"))
    backend = open_backend("torch", plan)
    vae = load_pipeline("demo").vae
    readings: dict[str, list[float]] = {"alone": [], "together": []}
    with torch.inference_mode():
        latent_BChw = torch.randn(1, 4, side // 8, side // 8)
        for number in range(-2, arguments["rounds"]):
            for way, times in readings.items():
                decoder = PatchDecoder(vae, plan, backend.for_plan) if way == "together" else None
                if decoder is not None:
                    vae.decode(latent_BChw)  # opens what it takes
                dist.barrier()
                start = time.perf_counter()
                if decoder is not None or backend.local_ranks[0] == 0:
                    vae.decode(latent_BChw)
                dist.barrier()
                if number >= 0:
                    times.append(time.perf_counter() - start)
                if decoder is not None:
                    decoder.close()
            report(number, arguments["rounds"])
    backend.close()
    return {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "threads_per_rank": torch.get_num_threads(),
        "alone_s": statistics.median(readings["alone"]),
        "together_s": statistics.median(readings["together"]),
        "speedup": statistics.median(a / b for a, b in zip(*readings.values(), strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    arguments = {"side": options.side, "ranks": options.gpus, "rounds": options.rounds}
    found = run_ranks(options.gpus, "benchmarks.decode:measure_as_rank", arguments, timeout_s=300.0)
    report = {
        "what": "seconds of decoding one picture: rank 0 alone on its threads, and all ranks a patch each",
        "command": f"python benchmarks/decode.py --side {options.side} --gpus {options.gpus} --rounds {options.rounds}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "side": options.side,
        **found,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
