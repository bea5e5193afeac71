"""What the ranks of `test_latent_on_patch` run: the demo pipeline by several plans, each from a seed of its own."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor

from distri.backends.base import Backend
from distri.backends.torch_distributed import TorchBackend
from distri.config.plan import parse_plan
from distri.core.plan import Plan
from distri.models.load import load_pipeline
from distri.models.samplers import use_sampler
from distri.pipeline import open_backend, parallelize

SENTENCE = "a red circle above a blue square on a green ground"
SEEDS_APART = 1000


def digest(value: Any) -> str:
    """Of the exact bits of a tensor."""
    return hashlib.sha256(torch.as_tensor(value).contiguous().numpy().tobytes()).hexdigest()


def draw(
    pipe: Any, plan: Plan, backend: Backend, case: dict[str, Any], seed: int
) -> tuple[str, list[Tensor], int]:
    """The digest of a drawing, the latents after each step, and forwards run.

    Every rank has that drawing (checked) where the latent stays on its patch; else only rank 0's is promised.
    """
    use_sampler(pipe, case.get("sampler", "ddim"))
    latents: list[Tensor] = []

    def on_step_end(pipe: Any, step: int, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        latents.append(state["latents"])
        pipe._interrupt = step == case.get("interrupt_after")
        return state

    with parallelize(pipe, plan, backend, splits_decoder=case.get("decodes", False)) as session:
        drawn = pipe(
            SENTENCE,
            height=plan.image.height,
            width=plan.image.width,
            num_inference_steps=case.get("steps", plan.image.num_inference_steps),
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=on_step_end,
            output_type="pt" if case.get("decodes") else "latent",
        ).images
        mine = digest(drawn)
        theirs = session.backend.broadcast({"drawn": mine})["drawn"]
    if plan.keeps_latent_on_patch and "interrupt_after" not in case:
        assert mine == theirs, "rank 0 has another drawing"
    assert "step" not in vars(pipe.scheduler)
    return mine, latents, len(latents)


def quiet_pipeline() -> Any:
    """The demo's."""
    pipe = load_pipeline("demo", "float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_cases(cases: list[dict[str, Any]], report: Any) -> list[dict[str, Any]]:
    """Every case, in one process a rank; what rank 0 has of it."""
    pipe, rank = quiet_pipeline(), int(os.environ["RANK"])
    found = []
    for case in cases:
        plan = parse_plan(json.dumps(case["plan"]))
        backend = TorchBackend(plan, timeout_s=30.0)
        mine, latents, steps = draw(pipe, plan, backend, case, SEEDS_APART * rank)
        stats = backend.transport(rank).stats
        others = [p for p in range(plan.mesh.patch) if p != plan.mesh.patch_of(rank)]
        moved = {
            p for p in others for late in latents[1:-1] if not torch.equal(*_cut(plan, p, latents[0], late))
        }
        if plan.keeps_latent_on_patch:
            assert not moved, "a patch of another rank changed before the last step"
        found.append({"drawn": mine, "steps": steps, "bytes": stats.bytes_received})
        report(len(found))
    return found


def _cut(plan: Plan, patch: int, *latents: Tensor) -> list[Tensor]:
    rows, cols = plan.partition.patches[patch].rows, plan.partition.patches[patch].cols
    return [x[..., rows.start : rows.stop, cols.start : cols.stop] for x in latents]


def draw_in_process(cases: list[dict[str, Any]]) -> list[str]:
    """The digests by the definition, from rank 0's seed."""
    pipe = quiet_pipeline()
    found = []
    for case in cases:
        plan = parse_plan(json.dumps(case["plan"]))
        found.append(draw(pipe, plan, open_backend("in_process", plan), case, 0)[0])
    return found


def draw_with_noise(case: dict[str, Any], report: Any) -> None:
    """A scheduler that draws noise of its own."""
    pipe = quiet_pipeline()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    plan = parse_plan(json.dumps(case["plan"]))
    with parallelize(pipe, plan, TorchBackend(plan, timeout_s=30.0)):
        pipe(SENTENCE, height=plan.image.height, width=plan.image.width, num_inference_steps=3)
