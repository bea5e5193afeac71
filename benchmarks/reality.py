"""Prediction beside measurement: the demo model on gloo, ranks in namespaces behind links of several rates.

    make reality            (as root, on Linux; a quarter of an hour)

The only inputs of a prediction are `distri profile` (layer times on this machine, ranks beside each other) and the link
probe (`distri profile --links`, through the same shaped links). Nothing is fitted to the runs that are predicted. What
is compared is the median over several images of the time of all denoising steps. The result is written to
benchmarks/results/reality.json; where namespaces are not allowed, the reason is printed and the exit status is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.namespaces import Network, is_available
from distri.config.hardware import load_cluster
from distri.config.plan import dump_plan, parse_plan
from distri.config.profile import Profile, load_profile
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.models.presets import load_graph
from distri.simulator.hardware import Cluster
from distri.simulator.result import SimulationResult

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "reality.json"
SIDE, STEPS, WARMUP = 512, 12, 3
MEGABIT = 1_000_000


@dataclass(frozen=True)
class Point:
    """One run: the rate of the links (None: as fast as the kernel moves bytes), ranks, and how they exchange."""

    rate: int | None
    ranks: int
    policy: str
    cfg_split: bool = False

    @property
    def name(self) -> str:
        rate = "unlimited" if self.rate is None else f"{self.rate // MEGABIT} Mb/s"
        return f"{rate}, {self.ranks} ranks, {self.policy}{', guidance split' if self.cfg_split else ''}"


POINTS = (
    Point(None, 2, "corrected"),
    Point(None, 2, "fresh"),
    Point(200 * MEGABIT, 2, "corrected"),
    Point(200 * MEGABIT, 2, "fresh"),
    Point(50 * MEGABIT, 2, "corrected"),
    Point(50 * MEGABIT, 2, "fresh"),
    Point(50 * MEGABIT, 2, "local"),
    Point(50 * MEGABIT, 2, "corrected", cfg_split=True),
    Point(20 * MEGABIT, 2, "corrected"),
    Point(200 * MEGABIT, 4, "corrected"),
    Point(50 * MEGABIT, 4, "corrected"),
    Point(50 * MEGABIT, 4, "corrected", cfg_split=True),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3, help="runs of each point")
    parser.add_argument("--only", default="", help="only points whose name contains this")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        run_as_rank(json.loads(options.as_rank))
        return 0
    if not is_available():
        return 0
    points = [point for point in POINTS if options.only in point.name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces go
    options.output.parent.mkdir(exist_ok=True)
    result = compare(points, options.images, options.output)
    print(f"median error {result['median_error']:.1%}, worst {result['worst_error']:.1%}; {options.output}")
    return 0


def compare(points: list[Point], images: int, output: Path) -> dict[str, Any]:
    """Profile, probe, predict, then measure; what is known so far is written after each point."""
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rate, ranks in dict.fromkeys((p.rate, p.ranks) for p in points):
            profile = profile_layers(ranks, Path(folder))
            with Network(ranks, rate) as network:
                cluster = probe(network, Path(folder))
                for point in (p for p in points if (p.rate, p.ranks) == (rate, ranks)):
                    plan = plan_of(point)
                    predicted = predict(plan, cluster, profile)
                    rows.append(row_of(point, predicted, measure(network, plan, images), cluster))
                    print(describe(rows[-1]), flush=True)
                    result = summary(rows, profile, images)
                    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def summary(rows: list[dict[str, Any]], profile: Profile, images: int) -> dict[str, Any]:
    """What the result file says."""
    errors = [abs(row["error"]) for row in rows]
    return {
        "what": "seconds of all denoising steps: predicted from a profile and a link probe, and measured",
        "command": "make reality",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": profile.device,
        "torch": profile.torch_version,
        "model": "demo",
        "image": f"{SIDE}x{SIDE}, {STEPS} steps, {WARMUP} of them warm-up, float32, 1 thread a rank",
        "images_measured": images,
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "points": rows,
    }


def row_of(
    point: Point, predicted: SimulationResult, ends: list[list[float]], cluster: Cluster
) -> dict[str, Any]:
    readings = [image[-1] for image in ends]
    measured = statistics.median(readings)
    link = cluster.links[-1]
    return {
        "rate_bits_per_s": point.rate,
        "ranks": point.ranks,
        "policy": point.policy,
        "cfg_split": point.cfg_split,
        "probed_bytes_per_s": link.bandwidth_bytes_per_s.value,
        "probed_latency_s": 2 * link.latency_s.value,
        "probed_handing_over_s": cluster.collectives.per_message_s.value,
        "probed_slowdown": cluster.collectives.compute_slowdown.value,
        "load_average": round(os.getloadavg()[0], 1),
        "predicted_s": predicted.latency_s,
        "measured_s": measured,
        "readings_s": readings,
        "error": predicted.latency_s / measured - 1,
        "predicted_steps_s": [seconds for _, seconds, count in predicted.steps for _ in range(count)],
        "measured_steps_s": [b - a for a, b in pairwise([0.0, *ends[-1]])],
    }


def describe(row: Mapping[str, Any]) -> str:
    point = Point(row["rate_bits_per_s"], row["ranks"], row["policy"], row["cfg_split"])
    spread = max(row["readings_s"]) / min(row["readings_s"]) - 1
    return (
        f"{point.name:44} predicted {row['predicted_s']:7.3f} s  measured {row['measured_s']:7.3f} s "
        f"(+-{spread / 2:.1%})  {row['error']:+.1%}"
    )


def plan_of(point: Point) -> Plan:
    request = PlanRequest(
        ImageRequest(SIDE, SIDE, STEPS),
        point.ranks,
        point.cfg_split,
        policy_table(point.policy),
        WARMUP,
        dtype="float32",
    )
    return make_plan(request, load_graph("demo"))


def profile_layers(ranks: int, folder: Path) -> Profile:
    """Layer times with `ranks` processes beside each other, on the cores that the ranks will have."""
    path = folder / f"profile{ranks}.json"
    command = [
        sys.executable,
        "-m",
        "distri",
        "profile",
        "--model",
        "demo",
        "--height",
        str(SIDE),
        "--width",
        str(SIDE),
    ]
    command += ["--gpus", str(ranks), "--beside", str(ranks), "-o", str(path)]
    with Network(ranks, None) as network:
        on_ranks(network, command)
    return load_profile(path)


def probe(network: Network, folder: Path) -> Cluster:
    """The hardware file that the link probe writes inside the namespaces."""
    path = folder / "links.yaml"
    command = [sys.executable, "-m", "distri", "profile", "--links", "--gpus", str(network.num_ranks)]
    on_ranks(network, [*command, "-o", str(path)])
    return load_cluster(path)


def on_ranks(network: Network, command: list[str]) -> str:
    """Run a command as every rank; returns what rank 0 printed."""
    port = 29400 + os.getpid() % 500
    processes = []
    for rank in range(network.num_ranks):
        environment = {**os.environ, **network.environment(rank, port), "PYTHONPATH": str(ROOT)}
        output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        processes.append(
            subprocess.Popen(
                [*network.command(rank), *pinned(rank), *command], env=environment, cwd=ROOT, stdout=output,
                stderr=subprocess.PIPE, text=True, start_new_session=True,
            )
        )  # fmt: skip
    try:
        ended = [process.communicate(timeout=1800) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
    for process, (_, said) in zip(processes, ended, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said[-2000:]}")
    return ended[0][0]


def pinned(rank: int) -> list[str]:
    """Keep a rank on one core, as the profile was taken; ahead of other work on this machine, as far as that goes."""
    cores = sorted(os.sched_getaffinity(0))
    first = 'echo -20 >/proc/self/autogroup 2>/dev/null; exec nice -n -19 "$@"'
    return [
        "setsid",
        "--wait",
        "bash",
        "-c",
        first,
        "rank",
        "taskset",
        "--cpu-list",
        str(cores[rank % len(cores)]),
    ]


def measure(network: Network, plan: Plan, images: int) -> list[list[float]]:
    """When each denoising step ended, in seconds, for each of several images."""
    arguments = json.dumps({"plan": dump_plan(plan), "images": images})
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(arguments)
        file.flush()
        said = on_ranks(
            network, [sys.executable, str(Path(__file__)), "--as-rank", json.dumps({"file": file.name})]
        )
    ends: list[list[float]] = json.loads(said.splitlines()[-1])["ends"]
    return ends


def run_as_rank(arguments: Mapping[str, Any]) -> None:
    """One measured rank: the demo denoiser, split as the plan says, on the torch backend."""
    import torch
    import torch.distributed as dist

    from distri.backends.torch_distributed import TorchBackend
    from distri.profiler.models import build_hollow, fill, step_arguments
    from distri.session import Session

    body = json.loads(Path(arguments["file"]).read_text(encoding="utf-8"))
    plan = parse_plan(json.dumps(body["plan"]))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    model = fill(build_hollow("demo"), device, torch.float32)
    rows, cols = plan.latent.rows.size, plan.latent.cols.size
    inputs = step_arguments(model, plan.image.batch, rows, cols, device, torch.float32)
    images: list[list[float]] = []
    with torch.inference_mode(), Session(model, TorchBackend(plan, device="cpu", timeout_s=300.0)) as session:
        for image in range(body["images"] + 1):
            session.begin_image()
            dist.barrier()
            start = time.perf_counter()
            ends = []
            for _ in range(plan.image.num_inference_steps):
                model(**inputs)
                ends.append(time.perf_counter() - start)
            if image:  # the first one allocates buffers
                images.append(ends)
    print(json.dumps({"ends": images}))


def predict(plan: Plan, cluster: Cluster, profile: Profile) -> SimulationResult:
    """The simulator's answer."""
    from distri.simulator.measured import MeasuredOperations
    from distri.simulator.simulate import simulate

    return simulate(
        plan, load_graph("demo"), cluster,
        compute=lambda device, launch: MeasuredOperations(profile.measurements, fallback_of(device, launch)),
    )  # fmt: skip


def fallback_of(device: Any, launch: Any) -> Any:
    from distri.simulator.compute import AnalyticCompute

    return AnalyticCompute(device, launch)


if __name__ == "__main__":
    raise SystemExit(main())
