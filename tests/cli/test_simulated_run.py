from pathlib import Path

import pytest

from tests.cli.conftest import Distri, left_behind


def test_without_weights_there_is_a_time_and_no_picture(distri: Distri, tmp_path: Path) -> None:
    outcome = distri(
        "run", "--backend", "sim", "--model", "sdxl", "--gpus", 8, "--hardware", "h100-sxm", "--json"
    )
    value = outcome.value
    assert value["seconds_are_simulated"]
    assert value["image"] is None
    assert (value["backend"], value["hardware"], value["ranks"]) == ("sim", "h100-sxm", 8)
    flags = ("--model", "sdxl", "--gpus", 8, "--hardware", "h100-sxm", "--json")
    assert value["seconds"] == distri("simulate", *flags).value["latency_s"]
    assert left_behind(tmp_path) == []


def test_the_table_names_what_is_simulated(distri: Distri) -> None:
    outcome = distri("run", "--backend", "sim", "--model", "sdxl", "--gpus", 2)
    assert outcome.status == 0
    for part in (
        "no such machine was used",
        "time, simulated on a100-sxm",
        "the weights of sdxl are not on this disk",
    ):
        assert part in outcome.out


@pytest.mark.slow
def test_with_weights_the_picture_is_drawn_here(distri: Distri, tmp_path: Path) -> None:
    flags = ("--num-inference-steps", 2, "--height", 128, "--width", 128, "--warmup-steps", 1)
    outcome = distri("run", "--backend", "sim", *flags, "-o", "picture.png", "--json")
    assert outcome.value["image"] == "picture.png"
    assert outcome.value["drawing_seconds"] > outcome.value["seconds"]
    assert left_behind(tmp_path) == ["picture.png"]


def test_an_unknown_machine_is_refused(distri: Distri) -> None:
    outcome = distri("run", "--backend", "sim", "--hardware", "b300")
    assert outcome.status == 2
    assert "unknown hardware 'b300'" in outcome.complaint
