"""What each synchronisation mode does to the picture: prompts x seeds x modes x ranks, from identical noise.

Every picture is drawn in process and held against the unmodified model's from the same noise, so that a difference is
the mode's alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from distri.config.policy import load_policy_table
from distri.core.graph import LayerGraph
from distri.core.partition import SplitAxis
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import PolicyTable, policy_table
from distri.core.refresh import RefreshRule
from distri.errors import PolicyError
from distri.quality import Picture, psnr_db, seam_visibility, ssim

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluationRequest:
    """What to draw: every combination of the tuples.

    A mode is a policy table's name, with `@cols` for columns, `+every=K` or `+above=X` for a refresh rule.
    """

    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    modes: tuple[str, ...] = ("corrected_async_gn", "naive_patch")
    ranks: tuple[int, ...] = (2, 4, 8)
    samplers: tuple[str, ...] = ("ddim",)
    steps: tuple[int, ...] = (50,)
    height: int = 256
    width: int = 256
    warmup_steps: int = 5
    guidance_scale: float = 3.0
    dtype: str = "float32"


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    mode: str
    ranks: int
    sampler: str
    steps: int


@dataclass(frozen=True)
class Observation:
    """One picture against the single device's.

    drift: relative RMS difference of the latent after each step. synchronous_steps: warm-up, refreshes. words_obeyed:
    the scene checker's verdict on this picture; None for prompts or models that it does not know. lpips: None where the
    package or its weights are absent.
    """

    setting: Setting
    prompt: str
    seed: int
    psnr_db: float
    ssim: float
    seam: float
    words_obeyed: bool | None
    lpips: float | None
    drift: tuple[float, ...]
    synchronous_steps: int
    bytes_per_step: int
    picture: Picture = field(repr=False, compare=False)


@dataclass(frozen=True)
class Row:
    """Averages over prompts and seeds. `bytes_per_step` is the most that one rank receives in a steady step.

    psnr_error_db: the mean's standard error; None for a single picture.
    """

    setting: Setting
    psnr_db: float
    psnr_error_db: float | None
    ssim: float
    seam: float
    words_obeyed: float | None
    lpips: float | None
    final_drift: float
    drift: tuple[float, ...]
    synchronous_steps: float
    bytes_per_step: int


@dataclass(frozen=True)
class Evaluation:
    """All observations, and the single device's pictures by (prompt, seed, sampler, steps)."""

    request: EvaluationRequest
    observations: tuple[Observation, ...]
    references: dict[tuple[str, int, str, int], Picture]
    reference_words_obeyed: float | None

    def rows(self) -> list[Row]:
        """One row a setting, in the order of the request."""
        grouped: dict[Setting, list[Observation]] = {}
        for observation in self.observations:
            grouped.setdefault(observation.setting, []).append(observation)
        return [_row(setting, found) for setting, found in grouped.items()]


def _row(setting: Setting, found: Sequence[Observation]) -> Row:
    drift = tuple(fmean(values) for values in zip(*(o.drift for o in found), strict=True))
    return Row(
        setting,
        fmean(o.psnr_db for o in found),
        standard_error([o.psnr_db for o in found]),
        fmean(o.ssim for o in found),
        fmean(o.seam for o in found),
        _mean([o.words_obeyed for o in found]),
        _mean([o.lpips for o in found]),
        drift[-1],
        drift,
        fmean(o.synchronous_steps for o in found),
        found[0].bytes_per_step,
    )


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of independent observations; None where there is only one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _mean(values: Sequence[float | bool | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return fmean(known) if known else None


def evaluate(request: EvaluationRequest, graph: LayerGraph, progress: Progress | None = None) -> Evaluation:
    """Draw everything that `request` asks for.

    Raises:
        UserError: the model, a mode or a split is impossible.
    """
    from distri.models.load import load_pipeline

    plans = {
        key: plan_of(request, graph, *key) for key in product(request.modes, request.ranks, request.steps)
    }
    pipe = load_pipeline(request.model, request.dtype)
    perceptual = load_lpips()
    observations, references, obeyed = [], {}, []
    cases = list(product(request.samplers, request.steps, request.prompts, request.seeds))
    total = len(cases) * (1 + len(request.modes) * len(request.ranks))
    done = 0
    for sampler, steps, prompt, seed in cases:
        trace = draw(pipe, request, sampler, steps, prompt, seed, None)
        references[prompt, seed, sampler, steps] = trace.picture
        obeyed.append(words_obeyed(request.model, prompt, trace.picture))
        done = _report(progress, done, total)
        for mode, ranks in product(request.modes, request.ranks):
            plan = plans[mode, ranks, steps]
            ours = draw(pipe, request, sampler, steps, prompt, seed, plan)
            observations.append(
                Observation(
                    Setting(mode, ranks, sampler, steps),
                    prompt,
                    seed,
                    psnr_db(ours.picture, trace.picture),
                    ssim(ours.picture, trace.picture),
                    seam_visibility(ours.picture, tuple(chain(*plan.partition.turns)), plan.model.vae_factor),
                    words_obeyed(request.model, prompt, ours.picture),
                    perceptual(ours.picture, trace.picture) if perceptual else None,
                    tuple(_drift(ours.latents, trace.latents)),
                    ours.synchronous_steps,
                    max(plan.bytes_received_per_step),
                    ours.picture,
                )
            )
            done = _report(progress, done, total)
    return Evaluation(request, tuple(observations), references, _mean(obeyed))


def _report(progress: Progress | None, done: int, total: int) -> int:
    if progress is not None:
        progress(done + 1, total)
    return done + 1


def plan_of(request: EvaluationRequest, graph: LayerGraph, mode: str, ranks: int, steps: int) -> Plan:
    """The plan of one setting; guidance is not split, so that `ranks` counts patches."""
    mode, *rules = mode.split("+")
    name, _, axis = mode.partition("@")
    image = ImageRequest(request.height, request.width, steps, request.guidance_scale > 1)
    return make_plan(
        PlanRequest(
            image,
            ranks,
            cfg_split=False,
            policy=table_of(name, graph),
            warmup_steps=min(request.warmup_steps, max(1, steps // 2)),
            axis=axis_of(axis or "rows"),
            dtype=request.dtype,
            refresh=refresh_of(rules),
        ),
        graph,
    )


def table_of(name: str, graph: LayerGraph) -> PolicyTable:
    """The built-in table of this name, or the one in a file of this name, if it is that of a YAML file.

    Raises:
        PolicyError: there is none, or the file does not hold one.
    """
    if name.endswith((".yaml", ".yml")):
        return load_policy_table(Path(name), "corrected", graph)
    return policy_table(name)


def axis_of(name: str) -> SplitAxis:
    """How a mode's `@name` cuts the picture.

    Raises:
        PolicyError: not at all.
    """
    known = [axis.value for axis in SplitAxis]
    if name not in known:
        raise PolicyError(f"unknown split {name!r}; known: {', '.join(known)}")
    return SplitAxis(name)


def refresh_of(rules: Sequence[str]) -> RefreshRule | None:
    """The refresh rule of a mode's `every=K` and `above=X`.

    Raises:
        PolicyError: it is neither.
    """
    values = dict(rule.partition("=")[::2] for rule in rules)
    try:
        every = int(values.pop("every")) if "every" in values else None
        above = float(values.pop("above")) if "above" in values else None
    except ValueError as error:
        raise PolicyError(f"a mode's refresh is a number, as in corrected+every=4: {error}") from error
    if values:
        raise PolicyError(f"unknown refresh {', '.join(values)!r}; known: every=K, above=X")
    return RefreshRule(above, every) if rules else None


@dataclass(frozen=True)
class Trace:
    """A picture, the latents after each step, and how many steps were synchronous."""

    picture: Picture
    latents: tuple[Tensor, ...]
    synchronous_steps: int


def draw(
    pipe: Any, request: EvaluationRequest, sampler: str, steps: int, prompt: str, seed: int, plan: Plan | None
) -> Trace:
    """One picture: by a plan, in process, or by the unmodified model."""
    from contextlib import nullcontext

    import torch

    from distri.models.samplers import use_sampler
    from distri.pipeline import open_backend
    from distri.session import Session

    use_sampler(pipe, sampler)
    latents: list[Tensor] = []

    def keep(_: Any, __: int, ___: Any, state: dict[str, Any]) -> dict[str, Any]:
        latents.append(state["latents"].float().clone())
        return state

    session = (
        Session(pipe.unet, open_backend("in_process", plan), lambda: pipe.scheduler.timesteps)
        if plan
        else nullcontext()
    )
    with torch.inference_mode(), session as opened:
        image = pipe(
            prompt=prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=keep,
        ).images[0]
    synchronous_steps = steps if opened is None else opened.num_synchronous_steps
    return Trace(np.asarray(image.convert("RGB")), tuple(latents), synchronous_steps)


def _drift(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> Iterator[float]:
    for a, b in zip(ours, reference, strict=True):
        yield float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def words_obeyed(model: str, prompt: str, picture: Picture) -> bool | None:
    """Whether the demo model's scene checker finds what the sentence says; None if it does not know the sentence."""
    if model != "demo":
        return None
    from distri.models.demo.checker import check
    from distri.models.demo.layouts import nominal_scene
    from distri.models.demo.sentences import SentenceError, parse

    try:
        scene = nominal_scene(parse(prompt))
    except SentenceError:
        return None
    return check(picture.astype(np.float32) / 255, scene).words_obeyed


def demo_prompts(count: int, seed: int = 0) -> tuple[str, ...]:
    """Held-out sentences of the demo model's language, the same ones for the same seed."""
    from distri.models.demo.sentences import sample_sentence

    rng = np.random.default_rng(seed)
    return tuple(sample_sentence(rng, held_out=True)[0] for _ in range(count))


def load_lpips() -> Callable[[Picture, Picture], float] | None:
    """LPIPS (AlexNet) if its package and weights are on this machine, otherwise None; nothing is downloaded."""
    from importlib.util import find_spec

    if find_spec("lpips") is None or find_spec("torchvision") is None:
        return None
    import lpips
    import torch

    weights = torch.hub.get_dir() + "/checkpoints/alexnet-owt-7be5be79.pth"
    try:
        with open(weights, "rb"):
            network = lpips.LPIPS(net="alex", verbose=False)
    except OSError:
        return None

    def distance(picture: Picture, reference: Picture) -> float:
        tensors = [
            torch.from_numpy(p.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
            for p in (picture, reference)
        ]
        with torch.inference_mode():
            return float(network(*tensors))

    return distance
