"""`distri run` and `distri compare` up to the executor, which has tests of its own."""

import json
from pathlib import Path

import pytest

from distri import comparison, executor
from distri.comparison import CompareResult
from distri.executor import RunResult
from distri.request import RunRequest
from tests.cli.conftest import Distri, Outcome, left_behind

COMMANDS = ["run", "compare"]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[RunRequest]:
    """What reaches the executor, which draws nothing here."""
    seen: list[RunRequest] = []

    def run(request: RunRequest, progress: object) -> RunResult:
        seen.append(request)
        return RunResult(request.output, 2.5, 0.1, request.plan.mesh.size, request.backend)

    def compare(request: RunRequest, progress: object) -> CompareResult:
        seen.append(request)
        return CompareResult(request.output, 40.0, 0.99, 0.5, 0.25, 2.5, 4.0)

    monkeypatch.setattr(executor, "run", run)
    monkeypatch.setattr(comparison, "compare", compare)
    return seen


def test_without_flags_the_demo_is_drawn_by_two_ranks(distri: Distri, requests: list[RunRequest]) -> None:
    outcome = distri("run", "-o", "out.png")
    assert outcome.status == 0
    (request,) = requests
    assert (request.model, request.plan.mesh.size, request.backend) == ("demo", 2, "torch")
    assert request.prompt == "a red circle above a blue square on a green ground"
    assert (request.plan.image.height, request.plan.image.width) == (512, 512)
    assert request.output == Path("out.png")


def test_json_of_a_run(distri: Distri, requests: list[RunRequest]) -> None:
    outcome = distri("run", "-o", "out.png", "--backend", "in_process", "--gpus", 3, "--json")
    assert outcome.value == {
        "image": "out.png",
        "seconds": 2.5,
        "seconds_per_step": 0.1,
        "ranks": 3,
        "backend": "in_process",
    }
    assert outcome.err == ""


def test_json_of_a_comparison(distri: Distri, requests: list[RunRequest]) -> None:
    assert distri("compare", "-o", "out.png", "--json").value == {
        "psnr_db": 40.0,
        "ssim": 0.99,
        "max_latent_difference": 0.5,
        "mean_latent_difference": 0.25,
        "seconds": 2.5,
        "single_seconds": 4.0,
        "image": "out.png",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_tables_name_the_picture(distri: Distri, requests: list[RunRequest], command: str) -> None:
    outcome = distri(command, "--gpus", "2", "--cfg-split", "off", "-o", "out.png")
    assert "out.png" in outcome.out
    assert outcome.err == ""


def test_flags_reach_the_request(distri: Distri, requests: list[RunRequest]) -> None:
    distri("run", "--prompt", "a blue ring", "--negative-prompt", "red", "--seed", 7, "--guidance-scale", 2.5)
    (request,) = requests
    assert (request.prompt, request.negative_prompt, request.seed) == ("a blue ring", "red", 7)
    assert request.guidance_scale == 2.5


def test_other_ranks_of_torchrun_print_nothing(
    distri: Distri, requests: list[RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    for command in COMMANDS:
        assert distri(command, "--json") == Outcome(0, "", "")


def written_plan(distri: Distri, *flags: object) -> dict[str, object]:
    value = distri(
        "plan", "--model", "demo", "--gpus", 3, "--cfg-split", "off", "-o", "plan.json", "--json", *flags
    ).value
    assert isinstance(value, dict)
    return value


def test_a_plan_from_a_file_is_run_as_it_is(distri: Distri, requests: list[RunRequest]) -> None:
    value = written_plan(distri, "--policy", "stale", "--guidance-scale", 1)
    assert distri("run", "--plan", "plan.json", "--gpus", 3, "--height", 512, "--model", "demo").status == 0
    (request,) = requests
    assert request.plan.hash == value["hash"]
    assert request.guidance_scale == 1.0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--model", "sdxl"), "the plan is for model 'demo'"),
        (("--height", 1024), "plan.json is a plan for --height 512, not 1024; make another plan"),
        (("--width", 256), "plan.json is a plan for --width 512, not 256"),
        (("--gpus", 2), "plan.json is a plan for --gpus 3, not 2"),
        (("--num-inference-steps", 9), "plan.json is a plan for --num-inference-steps 25, not 9"),
        (("--policy", "local"), "--policy belongs to the plan in plan.json; give one or the other"),
        (("--split", "cols"), "--split belongs to the plan"),
        (("--bands", "1,1,1"), "--bands belongs to the plan"),
        (("--guidance-scale", 1), "plan.json is a plan with guidance on; --guidance-scale 1 is not"),
    ],
)
def test_flags_that_contradict_the_plan_are_refused(
    distri: Distri,
    requests: list[RunRequest],
    tmp_path: Path,
    command: str,
    flags: tuple[object, ...],
    sentence: str,
) -> None:
    written_plan(distri)
    outcome = distri(command, "--plan", "plan.json", *flags)
    assert sentence in outcome.complaint
    assert outcome.status == 2
    assert requests == []
    assert left_behind(tmp_path) == ["plan.json"]


def test_an_edited_plan_is_refused(distri: Distri, requests: list[RunRequest], tmp_path: Path) -> None:
    value = written_plan(distri)
    (tmp_path / "plan.json").write_text(json.dumps({**value, "warmup_steps": 2}))
    assert "it was edited; make it again with 'distri plan'" in distri("run", "--plan", "plan.json").complaint


def test_a_plan_of_a_newer_schema_is_refused(
    distri: Distri, requests: list[RunRequest], tmp_path: Path
) -> None:
    value = written_plan(distri)
    (tmp_path / "plan.json").write_text(json.dumps({**value, "schema_version": 99}))
    outcome = distri("run", "--plan", "plan.json")
    assert "this distri reads plans of schema" in outcome.complaint
    assert "this one is of schema 99" in outcome.complaint


def test_a_truncated_plan_is_refused(distri: Distri, requests: list[RunRequest], tmp_path: Path) -> None:
    written_plan(distri)
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text[: len(text) // 2])
    outcome = distri("run", "--plan", "plan.json")
    assert "plan.json: not a plan: " in outcome.complaint
    assert outcome.status == 2


def test_a_plan_that_is_not_there_is_refused(distri: Distri, requests: list[RunRequest]) -> None:
    assert "none.json: cannot be read: No such file" in distri("run", "--plan", "none.json").complaint


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--gpus", 0), "at least 1 device is needed, not 0"),
        (("--gpus", 40), "do not split into 20 patches"),
        (("--model", "sd9"), "unknown model 'sd9'"),
        (("--backend", "smoke"), "'smoke' is not one of 'torch', 'in_process', 'sim'."),
        (("--seed", -1), "Invalid value for '--seed'"),
        (("--timeout", 0), "Invalid value for '--timeout'"),
        (("-o", "none/out.png"), "there is no directory none"),
        (("-o", "out.txt"), "pictures are written as .png, .jpg or .webp"),
        (("-o", "."), "is a directory"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_status_two(
    distri: Distri,
    requests: list[RunRequest],
    tmp_path: Path,
    command: str,
    flags: tuple[object, ...],
    sentence: str,
) -> None:
    outcome = distri(command, *flags)
    assert sentence in outcome.complaint
    assert outcome.status == 2
    assert requests == []
    assert left_behind(tmp_path) == []


def predicted(outcome: Outcome) -> float:
    return float(outcome.value["predicted_seconds_per_step"])


def test_the_second_prediction_is_what_the_first_run_took(distri: Distri, requests: list[RunRequest]) -> None:
    first, second = (distri("run", "-o", "out.png", "--json") for _ in range(2))
    assert predicted(first) != pytest.approx(0.1, rel=0.1)  # from assumed figures; the run takes 0.1 s a step
    assert predicted(second) == pytest.approx(0.1, rel=0.05)


def test_no_learn_keeps_nothing(distri: Distri, requests: list[RunRequest]) -> None:
    first, second = (distri("run", "-o", "out.png", "--json", "--no-learn") for _ in range(2))
    assert predicted(first) == predicted(second)


def test_a_lesson_that_cannot_be_kept_does_not_spoil_the_run(
    distri: Distri, requests: list[RunRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    outcome = distri("run", "-o", "out.png")
    assert outcome.status == 0
    assert "nothing, it cannot be kept: " in outcome.out
