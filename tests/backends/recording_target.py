"""What each started rank of the tests of recorded steps runs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch

from distri.config.plan import parse_plan
from distri.core.plan import Plan
from distri.executor import call_pipeline, use_threads
from distri.models.load import load_pipeline
from distri.pipeline import parallelize
from distri.request import RunRequest
from distri.session import Session
from tests.backends.conformance_target import digests
from tests.backends.tape import RefusingBackend, TapeBackend
from tests.toys import inputs_of, toy


@torch.no_grad()
def run(arguments: dict[str, Any], report: Callable[..., None]) -> list[dict[str, Any]]:
    """For each plan: digests of two images of different texts, what was sent, and what was recorded and replayed."""
    return [_run_plan(parse_plan(json.dumps(text)), arguments["how"]) for text in arguments["plans"]]


def _run_plan(plan: Plan, how: str) -> dict[str, Any]:
    model, _ = toy()
    backend = (RefusingBackend if how == "refused" else TapeBackend)(plan, timeout_s=30.0)
    found = []
    with (
        warnings.catch_warnings(record=True) as warned,
        Session(model, backend, records=how != "plain") as session,
    ):
        warnings.simplefilter("always")
        for image in range(2):
            session.begin_image()
            outputs = []
            for step in range(plan.image.num_inference_steps):
                given = inputs_of(plan, step)
                given["encoder_hidden_states"] = given["encoder_hidden_states"] + image
                outputs.append(model(**given)[0].clone())
            found.append(digests(outputs))
        stats = backend.transport(backend.rank).stats
        return {
            "digests": found,
            "recordings": len(backend.deck.tapes),
            "replays": sum(max(0, tape.num_replays - 1) for tape in backend.deck.tapes),
            "bytes": stats.bytes_received,
            "parcels": stats.num_parcels,
            "warned": _collected(backend, [str(warning.message) for warning in warned]),
        }


def _collected(backend: TapeBackend, messages: list[str]) -> list[list[str]]:
    """Every rank's, on rank 0."""
    return [json.loads(text) for text in backend.collect(json.dumps(messages)) or ()]


def draw(arguments: dict[str, Any], report: Callable[..., None]) -> dict[str, Any]:
    """The latents of two prompts that one pipeline draws, as digests, and how many steps were replayed."""
    plan = parse_plan(json.dumps(arguments["plan"]))
    use_threads(plan.mesh.size)
    pipe = load_pipeline("demo", plan.dtype)
    backend = TapeBackend(plan, timeout_s=30.0)
    found = []
    with parallelize(pipe, plan, backend, cuda_graphs=arguments["how"] == "recorded"):
        for prompt in ("a red ring", "a large blue square on a white ground"):
            request = RunRequest("demo", plan, prompt)
            found.append(call_pipeline(pipe, request, {"prompt": prompt}, decodes=False).latent_BCHW)
    return {"digests": digests(found), "replays": sum(tape.num_replays - 1 for tape in backend.deck.tapes)}
