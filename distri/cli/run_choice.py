"""`distri run` without a plan: plan for the machine at hand, say what was chosen, hold the prediction to the run.

Flags that describe a plan are obeyed as they are, and so is a number of ranks. Ranks that torchrun started all have to
make the same plan from the flags alone, so nothing is searched there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import click

from distri.cli.render import late_progress_bar
from distri.cli.search_options import graph_files, is_explicit
from distri.core.plan import Plan
from distri.core.planner import make_plan

CPU_RANKS: Final = 2
"""Ranks of a run on a machine without GPUs, where none were asked for."""


@dataclass(frozen=True)
class Choice:
    """A plan that was searched for; `sentence` says what was chosen and why."""

    plan: Plan
    predicted_s: float
    hardware: str
    sentence: str

    @property
    def predicted_per_step_s(self) -> float:
        """Predicted seconds of one denoising step."""
        return self.predicted_s / self.plan.image.num_inference_steps


def choose(ctx: click.Context, flags: Mapping[str, Any]) -> Choice | None:
    """The best plan for the machine at hand; None where flags, a file or torchrun say what to run.

    Raises:
        UserError: the picture cannot be made at all.
    """
    if (
        flags["plan_path"] is not None
        or flags["backend"] != "torch"
        or is_explicit(ctx)
        or "RANK" in os.environ
    ):
        return None
    from distri.probe import probe
    from distri.search import learned
    from distri.search.planning import answer

    machine = probe()
    own = learned.own_hardware()
    hardware = str(own) if own is not None else machine.hardware
    if hardware is None:
        click.echo(
            f"distri: no hardware file describes {machine}; the plan follows a rule, not a prediction "
            "(`distri profile --links -o` writes one)",
            err=True,
        )
        return None
    is_given = ctx.get_parameter_source("gpus") is click.core.ParameterSource.COMMANDLINE
    count = flags["gpus"] if is_given else CPU_RANKS if machine.is_cpu else len(machine.devices)
    question = _question(flags, hardware, count, is_exact=is_given or machine.is_cpu)
    if question is None:
        return None
    with late_progress_bar("planning") as progress:
        found = answer(question, progress)
    from distri.config.plan import parse_plan

    plan, search = parse_plan(json.dumps(found["plan"])), found["search"]
    return Choice(plan, search["prediction"]["latency_s"], hardware, sentence_of(search, str(machine)))


def _question(flags: Mapping[str, Any], hardware: str, count: int, is_exact: bool) -> Any:
    """The question; None for what the hardware file cannot answer, so that the flags' own refusal is heard."""
    from distri.cli.options import load_model_graph, plan_request_from
    from distri.config.hardware import load_cluster
    from distri.search import learned
    from distri.search.planning import Question
    from distri.search.request import SearchRequest

    request = plan_request_from(flags)
    files, _ = graph_files(flags["model"])
    graph = load_model_graph(flags["model"])
    make_plan(request, graph)  # what cannot be done at all is refused in the words of the rule
    if not 1 <= count <= load_cluster(hardware).num_ranks:
        return None
    speed = learned.speed_of(learned.Subject(hardware, graph.fingerprint, request.dtype))
    asked = SearchRequest(
        request.image,
        count,
        request.dtype,
        is_exact=is_exact,
        speeds=() if speed == 1.0 else tuple((rank, speed) for rank in range(count)),
    )
    profile = learned.own_profile()
    if profile is not None and not _suits(profile, graph.fingerprint, request.dtype):
        profile = None
    return Question(asked, hardware, None, files, lambda: graph, profile)


def _suits(path: Any, fingerprint: str, dtype: str) -> bool:
    from distri.config.profile import load_profile

    profile = load_profile(path)
    return profile.fingerprint == fingerprint and profile.dtype == dtype


def sentence_of(search: Mapping[str, Any], machine: str) -> str:
    """One line: what was chosen on what, what it should take, and what the next best loses by."""
    p = search["prediction"]
    size = len(search["devices"])
    name = search["layout"] if size > 1 else "1 device"
    others = [r for r in search["runners_up"] if r["devices"] == size and r["layout"] != search["layout"]]
    why = f"; {others[0]['layout']} lost: {others[0]['why']}" if others else ""
    gain = f", {p['speedup']:.1f} times one device" if size > 1 else ""
    return f"plan: {name}, {search['policy']}, on {machine}: {p['latency_s']:.1f} s of denoising predicted{gain}{why}"


def report(choice: Choice, seconds_per_step: float, is_learning: bool) -> list[tuple[str, str]]:
    """Rows for the table after a run: predicted beside measured, and what was learned."""
    predicted = choice.predicted_per_step_s
    rows = [
        (
            "predicted for a step",
            f"{predicted:.3f} s ({predicted / seconds_per_step - 1:+.0%} against the measured)",
        )
    ]
    if is_learning:
        from distri.search import learned

        plan = choice.plan
        subject = learned.Subject(choice.hardware, plan.model.fingerprint, plan.dtype)
        try:
            speed = learned.learn(subject, predicted, seconds_per_step)
        except OSError as error:
            rows.append(("learned", f"nothing, it cannot be kept: {error.strerror}"))
        else:
            rows.append(("learned", f"this machine has {speed:.2g} of the speed that {choice.hardware} says"))
    return rows


def with_prediction(choice: Choice | None, result: dict[str, Any]) -> dict[str, Any]:
    """A run's JSON with the prediction beside it."""
    if choice is None:
        return result
    return {**result, "predicted_seconds_per_step": choice.predicted_per_step_s, "plan": choice.plan.hash}
