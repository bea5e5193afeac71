"""`--latent`: it reaches the plan, goes through a file, and is refused where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Distri

PLAN = ("plan", "--model", "demo", "--gpus", 4, "--cfg-split", "off", "--num-inference-steps", 9)


def test_the_plan_has_a_local_output_and_a_fresh_first_convolution(distri: Distri) -> None:
    outcome = distri(*PLAN, "--latent", "patch", "--json")
    assert outcome.status == 0, outcome.err
    served = {e["layer"]: (e["kind"], e["warmup"], e["steady"]) for e in outcome.value["exchanges"]}
    assert served["output"] == ("output", "local", "local")
    assert served["conv_in"] == ("halo", "fresh", "fresh")
    assert outcome.value["policy"]["name"] == "corrected, latent on patch"
    assert outcome.value["latent_layers"] == []
    whole = distri(*PLAN, "--latent", "whole", "--json").value
    assert whole == distri(*PLAN, "--json").value
    assert outcome.value["bytes_received_per_step"] < whole["bytes_received_per_step"]


def test_the_flag_alone_asks_for_one_plan(distri: Distri) -> None:
    outcome = distri("plan", "--model", "demo", "--gpus", 2, "--latent", "patch", "--json")
    assert outcome.status == 0, outcome.err
    assert "search" not in outcome.value


def test_tables_show_what_partners_exchange(distri: Distri) -> None:
    outcome = distri("plan", "--model", "demo", "--gpus", 4, "--cfg-split", "on", "--latent", "patch")
    assert outcome.status == 0, outcome.err
    (row,) = [line for line in outcome.out.splitlines() if "output" in line]
    assert "local" in row
    assert "0 B" not in row


@pytest.mark.parametrize(
    ("split", "source"), [("on", "its partner in the other branch"), ("off", "no other")]
)
def test_the_life_of_an_output_that_stays(distri: Distri, split: str, source: str) -> None:
    flags = ("--gpus", 4, "--cfg-split", split, "--latent", "patch", "--explain", "output")
    outcome = distri("plan", "--model", "demo", *flags)
    assert outcome.status == 0, outcome.err
    assert f"from {source}" in outcome.out
    assert "the latent stays on its patch, and is gathered after the last step" in outcome.out


def test_a_plan_from_a_file_says_where_its_latent_lies(distri: Distri, tmp_path: Path) -> None:
    assert distri(*PLAN, "--latent", "patch", "-o", "plan.json").status == 0
    outcome = distri("simulate", "plan.json", "--json")
    assert outcome.status == 0, outcome.err
    assert distri("simulate", *PLAN[1:], "--latent", "patch", "--json").value == outcome.value
    refused = distri("simulate", "plan.json", "--latent", "patch")
    assert refused.status == 2
    assert "--latent belongs to the plan in plan.json; give one or the other" in refused.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ("--policy", "naive_patch", "--split", "alternate"),
            "so no rank can keep its own; use --latent whole",
        ),
        (("--refresh-above", 0.1), "use --refresh-every or --latent whole"),
    ],
)
def test_what_needs_the_whole_latent_is_one_line_and_status_2(
    distri: Distri, flags: tuple[object, ...], sentence: str
) -> None:
    outcome = distri(*PLAN, "--latent", "patch", *flags)
    assert outcome.status == 2
    assert sentence in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_the_published_pattern_gathers_all(distri: Distri) -> None:
    outcome = distri("simulate", *PLAN[1:], "--latent", "patch", "--pattern", "gather_all")
    assert outcome.status == 2
    assert "--pattern gather_all needs --latent whole" in outcome.err


@pytest.mark.parametrize("more", [("--checkpoint-every", 2), ("--elastic",), ("--resume", "kept")])
def test_a_run_with_checkpoints_is_refused_before_anything_is_loaded(
    distri: Distri, more: tuple[object, ...]
) -> None:
    flags = (*PLAN[1:], "--latent", "patch", "--backend", "in_process", "-o", "out.png")
    outcome = distri("run", *flags, *more)
    assert outcome.status == 2
    assert "plan with --latent whole, or run without checkpoints" in outcome.err
