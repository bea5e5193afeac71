"""What each started rank of the conformance test runs: toys by plans on the gloo backend, outputs as digests."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distri.backends.torch_distributed import TorchBackend
from distri.config.plan import parse_plan
from distri.core.plan import Plan
from distri.session import Session
from tests.toys import inputs_of, toy


def digests(outputs: Sequence[Tensor]) -> list[str]:
    """One digest of the exact bits for each step."""
    return [hashlib.sha256(output.contiguous().numpy().tobytes()).hexdigest() for output in outputs]


@torch.no_grad()
def run(arguments: dict[str, Any], report: Callable[..., None]) -> list[list[str]]:
    """The digests of every plan's steps, twice over each, to cover a second image."""
    model, _ = toy()
    delays = random.Random(arguments["delay_seed"])
    found = []
    for text in arguments["plans"]:
        plan = parse_plan(json.dumps(text))
        with Session(model, TorchBackend(plan, timeout_s=30.0)) as session:
            for _ in range(2):
                session.begin_image()
                outputs = [
                    _delayed_step(model, plan, step, delays, arguments["delay_s"]) for step in _steps(plan)
                ]
        found.append(digests(outputs))
    return found


def _steps(plan: Plan) -> range:
    return range(plan.image.num_inference_steps)


def _delayed_step(model: Any, plan: Plan, step: int, delays: random.Random, delay_s: float) -> Tensor:
    time.sleep(delays.random() * delay_s)
    output: Tensor = model(**inputs_of(plan, step))[0]
    return output
