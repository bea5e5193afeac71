"""How much communication shows: `distri bench` with ranks in network namespaces, behind links of a given rate.

    python benchmarks/exposed.py [--rate MBIT] [--side 512] [--layers-per-bucket 8]          (Linux, as root)

Messages carry few layers, as the planner has it for a slow link. Without --rate, the rate is searched at which `fresh`
waits for a third of its step; then `corrected` must wait for at most a quarter of what `fresh` waits. Writes
benchmarks/results/exposed.json. Where namespaces are not allowed, the reason is printed and the status is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.namespaces import Network, is_available

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "exposed.json"
MEGABIT = 1_000_000
TARGET = 1 / 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=int, help="of the links, in Mbit/s")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers-per-bucket", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not is_available():
        return 0
    layers = options.layers_per_bucket
    rate = options.rate or find_rate(options.side, layers)
    throttled = bench(rate, options.side, options.rounds, layers)
    free = bench(None, options.side, options.rounds, layers)
    waits = {row["name"]: row["exposed"] * row["step_s"] for row in throttled["rows"]}
    report = {
        "what": "seconds of waiting in a steady step, mean of the ranks; throttled so that fresh waits for a third",
        "command": f"python benchmarks/exposed.py --rate {rate} --side {options.side} --rounds {options.rounds} "
        f"--layers-per-bucket {layers}",
        "rate_mbit_per_s": rate,
        "corrected_to_fresh": waits["corrected"] / waits["fresh"],
        "throttled": throttled,
        "unlimited": free,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"{rate} Mbit/s: corrected waits {report['corrected_to_fresh']:.2f} of what fresh waits; {options.output}"
    )
    return 0


def find_rate(side: int, layers: int) -> int:
    """Halve or double from 200 Mbit/s until `fresh` waits for about a third of its step, then refine twice."""
    low, high, rate = 1.0, 20_000.0, 200.0
    for _ in range(6):
        (row,) = [
            row for row in bench(round(rate), side, 2, layers, "fresh")["rows"] if row["name"] == "fresh"
        ]
        print(f"{rate:.0f} Mbit/s: fresh waits {row['exposed']:.0%}", flush=True)
        if abs(row["exposed"] - TARGET) < 0.03:
            break
        low, high = (rate, high) if row["exposed"] > TARGET else (low, rate)
        rate = (low * high) ** 0.5
    return round(rate)


def bench(
    rate: int | None, side: int, rounds: int, layers: int, modes: str = "corrected,fresh,local,gather_all"
) -> dict[str, Any]:
    """One `distri bench`, a rank in each of two namespaces."""
    with (
        Network(2, None if rate is None else rate * MEGABIT) as network,
        tempfile.TemporaryDirectory() as folder,
    ):
        output = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "distri", "bench", "--model", "demo", "--gpus", "2"]
        command += ["--height", str(side), "--width", str(side), "--rounds", str(rounds), "--modes", modes]
        command += ["--layers-per-bucket", str(layers)]
        ranks = []
        for rank in range(2):
            more = ["-o", str(output)] if rank == 0 else []
            environment = {**os.environ, **network.environment(rank, 29477), "PYTHONPATH": str(ROOT)}
            ranks.append(
                subprocess.Popen(
                    [*network.command(rank), *command, *more],
                    env=environment,
                    cwd=ROOT,
                    stdout=subprocess.DEVNULL,
                )
            )
        if any(rank.wait(timeout=3600) for rank in ranks):
            raise RuntimeError("a rank of the measurement failed; see above")
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found


if __name__ == "__main__":
    sys.exit(main())
