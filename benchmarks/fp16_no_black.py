"""Half precision draws no black picture: random runs of the demo model, 512 and 768 pixels, four and eight patches.

    python benchmarks/fp16_no_black.py --runs 100 -o benchmarks/results/fp16_no_black.json

Each run draws prompt, seed, sampler, steps and guidance at random from a seeded generator; sizes, ranks and modes take
turns. It draws in process and in float16, and looks at the latent after each step and at the picture: a NaN or an
infinity anywhere, a picture that is black, or one of a single colour, fails it. Results are written after every run; an
interrupted study goes on.

Processors have no units for float16 and take far longer. `--emulated` computes as tensor cores do: products are summed
up in float32, and what each module returns is rounded to float16, overflow to infinity included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from distri.evaluation import EvaluationRequest, demo_prompts, draw, plan_of
from distri.models.load import load_pipeline
from distri.models.presets import load_graph
from distri.profiler.measure import device_name

MODES = ("corrected_async_gn", "stale_gn", "shifted_gn", "separate_gn", "sync_gn", "no_sync", "naive_patch")
MODES += ("extrapolated", "extrapolated_gn", "residual_int4", "partial")
BLACK = 8
"""The brightest value, of 255, that a black picture has."""


def case_of(number: int, prompts: tuple[str, ...]) -> dict[str, Any]:
    """The `number`-th run: the same one every time. Sizes and ranks take turns, the rest is drawn."""
    chance = random.Random(number)
    return {
        "run": number,
        "pixels": (512, 768)[number % 2],
        "ranks": (4, 8)[number // 2 % 2],
        "mode": MODES[number // 4 % len(MODES)],
        "sampler": chance.choice(("ddim", "euler", "dpm-solver++")),
        "steps": chance.choice((4, 6, 8)),
        "guidance_scale": chance.choice((1.0, 3.0, 7.5)),
        "prompt": chance.choice(prompts),
        "seed": chance.randrange(2**31),
    }


@cache
def loaded(is_emulated: bool) -> tuple[Any, Any]:
    """The pipeline, and the graph of its denoiser."""
    pipe = load_pipeline("demo", "float32" if is_emulated else "float16")
    if is_emulated:
        round_outputs(pipe.unet)
        round_outputs(pipe.vae)
    return pipe, load_graph("demo")


def run(is_emulated: bool, number: int) -> dict[str, Any]:
    """Draw one case and judge it."""
    torch.set_num_threads(1)
    pipe, graph = loaded(is_emulated)
    case = case_of(number, demo_prompts(20))
    request = EvaluationRequest(
        "demo",
        (case["prompt"],),
        height=case["pixels"],
        width=case["pixels"],
        guidance_scale=case["guidance_scale"],
        warmup_steps=1,
        dtype="float16",
    )
    plan = plan_of(request, graph, case["mode"], case["ranks"], case["steps"])
    started = time.perf_counter()
    trace = draw(pipe, request, case["sampler"], case["steps"], case["prompt"], case["seed"], plan)
    picture = trace.picture.astype(np.float32)
    return {
        **case,
        "finite": all(bool(latent.isfinite().all()) for latent in trace.latents),
        "brightest": int(picture.max()),
        "spread": round(float(picture.std()), 3),
        "largest_latent": round(max(float(latent.abs().max()) for latent in trace.latents), 3),
        "seconds": round(time.perf_counter() - started, 2),
    }


def round_outputs(module: torch.nn.Module) -> None:
    """Have every module below return float16 values, held as float32."""

    def rounded(_: torch.nn.Module, __: Any, output: Any) -> Any:
        return output.half().float() if isinstance(output, torch.Tensor) else output

    for part in module.modules():
        part.register_forward_hook(rounded)


def is_good(result: dict[str, Any]) -> bool:
    """No NaN, not black, not of one colour."""
    return bool(result["finite"] and result["brightest"] > BLACK and result["spread"] > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--emulated", action="store_true", help="float32 products, outputs rounded to float16"
    )
    parser.add_argument("--processes", type=int, default=1, help="That draw at once, on one thread each.")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else []
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        numbers = range(len(results), arguments.runs)
        for result in pool.map(partial(run, arguments.emulated), numbers):
            results.append(result)
            write(arguments.output, results, arguments.emulated)
            print(json.dumps(result), flush=True)
    bad = write(arguments.output, results, arguments.emulated)
    print(f"{len(results)} runs, bad: {bad or 'none'}")


def write(path: Path, results: list[dict[str, Any]], is_emulated: bool) -> list[int]:
    """Write all results so far; returns the numbers of those that failed."""
    bad = [result["run"] for result in results if not is_good(result)]
    summary = {
        "what": "random runs in float16 on four and eight patches; bad are those with a NaN or a black picture",
        "command": f"python benchmarks/fp16_no_black.py{' --emulated' * is_emulated} --runs {len(results)}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "torch": str(torch.__version__),
        "emulated": is_emulated,
        "bad": bad,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**summary, "results": results}, indent=1) + "\n", encoding="utf-8")
    return bad


if __name__ == "__main__":
    main()
