"""How often the checkpoint obeys its words: `python -m distri.models.demo.evaluate --sentences 100 --size 512`.

Draws held-out sentences, makes each picture with the real pipeline on this machine and lets the checker judge it.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from tqdm import tqdm

from distri.models.demo import checkpoint_path
from distri.models.demo.checker import Report, check
from distri.models.demo.layouts import Layout, nominal_scene
from distri.models.demo.sentences import sample_sentence

SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm": DPMSolverMultistepScheduler}


def load_pipeline(folder: Path, scheduler: str = "ddim") -> StableDiffusionXLPipeline:
    """The shipped pipeline in float32 with the scheduler asked for, silent."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def held_out_sentences(count: int, seed: int) -> list[tuple[str, Layout]]:
    """`count` sentences from the held-out side of the split, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    return [sample_sentence(rng, held_out=True) for _ in range(count)]


def summarise(reports: Sequence[Report]) -> dict[str, float]:
    """Shares in 0..1: of things for colour, shape, position, size; of pictures for the rest."""
    verdicts = [verdict for report in reports for verdict in report.verdicts]
    share = {
        name: float(np.mean([getattr(v, name) for v in verdicts]))
        for name in ("colour", "shape", "position", "size")
    }
    for name in ("ground", "count", "words_obeyed", "all_obeyed"):
        share[name] = float(np.mean([getattr(report, name) for report in reports]))
    return share


def main(arguments: list[str] | None = None) -> None:
    """Draw, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument(
        "--size", type=int, nargs="+", default=[512], help="height, or height and width, in pixels"
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--save", type=Path, help="folder for the pictures")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(flags.threads)
    height, width = flags.size[0], flags.size[-1]
    pipeline = load_pipeline(flags.checkpoint, flags.scheduler)
    reports, start = [], time.monotonic()
    drawn = held_out_sentences(flags.sentences, flags.seed)
    for index, (sentence, layout) in enumerate(tqdm(drawn, disable=flags.json)):
        image = pipeline(
            sentence,
            height=height,
            width=width,
            num_inference_steps=flags.steps,
            guidance_scale=flags.guidance,
            generator=torch.Generator().manual_seed(flags.seed + index),
        ).images[0]
        reports.append(check(np.asarray(image, dtype=np.float32) / 255, nominal_scene(layout)))
        if flags.save:
            flags.save.mkdir(parents=True, exist_ok=True)
            mark = "yes" if reports[-1].words_obeyed else "no"
            image.save(flags.save / f"{index:03d}_{mark}_{sentence.replace(' ', '_')}.png")
    result = summarise(reports) | {"seconds_per_picture": (time.monotonic() - start) / len(reports)}
    if flags.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:>20} {value:.3f}")


if __name__ == "__main__":
    main()
