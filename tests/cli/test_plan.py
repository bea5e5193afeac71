import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distri.config.plan import load_plan
from distri.core.policy import builtin_tables
from tests.cli.conftest import Distri, left_behind

PAPER = ("plan", "--model", "sdxl", "--height", 1280, "--width", 1920, "--num-inference-steps", 50, "--json")


@pytest.mark.parametrize(
    ("flags", "tera", "within"),
    [
        (("--gpus", 1), 907, 0.001),
        (("--gpus", 4, "--cfg-split", "off"), 227, 0.005),
        (("--gpus", 4, "--cfg-split", "off", "--policy", "local"), 190, 0.001),
        (("--gpus", 8, "--cfg-split", "on"), 113, 0.001),
    ],
)
def test_the_published_macs_come_out(
    distri: Distri, flags: tuple[object, ...], tera: float, within: float
) -> None:
    outcome = distri(*PAPER, *flags)
    assert outcome.status == 0
    assert outcome.err == ""
    assert len(outcome.value["macs_per_device"]) == flags[1]
    for macs in outcome.value["macs_per_device"]:
        assert macs / 1e12 == pytest.approx(tera, rel=within)


def test_the_written_plan_is_the_printed_one_and_reads_back(distri: Distri, tmp_path: Path) -> None:
    outcome = distri("plan", "--gpus", 4, "--model", "demo", "--json", "-o", "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == outcome.value
    assert load_plan(tmp_path / "plan.json").hash == outcome.value["hash"]
    assert left_behind(tmp_path) == ["plan.json"]


def test_the_table_says_what_matters(distri: Distri) -> None:
    outcome = distri("plan", "--gpus", 8)
    assert outcome.status == 0
    for part in (
        "sdxl: 1024x1024 pixels, 50 steps",
        "2 guidance branches x 4 patches",
        "41.96 T",
        "corrected",
    ):
        assert part in outcome.out
    for kind in ("halo", "moments", "context", "output"):
        assert kind in outcome.out
    assert "\x1b" not in outcome.out


def test_models_have_their_own_defaults(distri: Distri) -> None:
    demo, sdxl = (distri("plan", "--model", name, "--json").value for name in ("demo", "sdxl"))
    assert (demo["image"]["height"], demo["image"]["width"], demo["dtype"]) == (512, 512, "float32")
    assert (sdxl["image"]["height"], sdxl["image"]["width"], sdxl["dtype"]) == (1024, 1024, "float16")


def test_a_guidance_scale_of_one_or_less_turns_guidance_off(distri: Distri) -> None:
    for scale, guidance, mesh in ((1, False, {"cfg": 1, "patch": 4}), (1.5, True, {"cfg": 2, "patch": 2})):
        value = distri("plan", "--gpus", 4, "--guidance-scale", scale, "--json").value
        assert value["image"]["guidance"] is guidance
        assert value["mesh"] == mesh


@pytest.mark.parametrize("policy", builtin_tables())
@pytest.mark.parametrize("split", ["rows", "cols", "grid"])
def test_every_policy_and_split_has_a_plan(distri: Distri, policy: str, split: str) -> None:
    outcome = distri("plan", "--model", "demo", "--gpus", 4, "--policy", policy, "--split", split)
    assert outcome.status == 0


def test_bands_may_be_uneven(distri: Distri) -> None:
    value = distri("plan", "--model", "demo", "--gpus", 3, "--bands", "3,2,1", "--json").value
    assert [band["rows"][1] - band["rows"][0] for band in value["bands"]] == [32, 20, 12]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--gpus", 0), "at least 1 device is needed, not 0"),
        (("--gpus", -1), "at least 1 device is needed, not -1"),
        (("--gpus", "two"), "Invalid value for '--gpus': 'two' is not a valid integer."),
        (
            ("--gpus", 13, "--height", 384, "--cfg-split", "off"),
            "384 pixel rows do not split into 13 patches: down_blocks.1.downsamplers.0.conv",
        ),
        (("--gpus", 10**12), "use at most 32 patches, or a height of at least"),
        (
            ("--gpus", 64, "--cfg-split", "off", "--split", "cols"),
            "1024 pixel columns do not split into 64 patches",
        ),
        (("--gpus", 3, "--cfg-split", "on"), "3 devices are not an even number; use --cfg-split off"),
        (("--cfg-split", "maybe"), "'maybe' is not one of 'auto', 'on', 'off'."),
        (
            ("--height", 1001),
            "a height of 1001 pixels is not a positive multiple of the VAE's factor 8; use 1000 or 1008",
        ),
        (("--width", -8), "a width of -8 pixels is not a positive multiple"),
        (("--num-inference-steps", 0), "at least 1 denoising step is needed, not 0"),
        (("--gpus", 2, "--cfg-split", "off", "--warmup-steps", 0), "use --warmup-steps 1 or more"),
        (("--warmup-steps", -3), "the number of warm-up steps cannot be negative: -3"),
        (("--policy", "fastest"), "unknown policy 'fastest'; known: corrected, stale, fresh, local"),
        (("--split", "diagonal"), "'diagonal' is not one of 'rows', 'cols', 'grid', 'alternate'."),
        (("--gpus", 4, "--split", "alternate"), "use it with --policy naive_patch"),
        (("--bands", "3,2"), "2 band weights were given for 1 patches; give one for each"),
        (("--bands", "3,x"), "'3,x' is not a list of numbers such as 3,2,1"),
        (("--bands", "1/0"), "'1/0' is not a list of numbers such as 3,2,1"),
        (("--bands", "3,-2"), "'3,-2': weights must be positive"),
        (("--gpus", 2, "--cfg-split", "off", "--bands", "1,1", "--split", "grid"), "not with a grid"),
        (("--guidance-scale", "nan"), "nan is not a finite number"),
        (("--dtype", "float8"), "'float8' is not one of"),
        (("--model", "sd9"), "unknown model 'sd9': neither a preset (sdxl, demo) nor a directory"),
        (("--bogus",), "No such option '--bogus'"),
        (("extra",), "unexpected extra argument"),
        (("-o", "nowhere/plan.json"), "nowhere/plan.json: there is no directory nowhere"),
        (("-o", "."), ".: is not a file; name one"),
        (("-o", "/dev/null"), "/dev/null: is not a file; name one"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_status_two(
    distri: Distri, tmp_path: Path, flags: tuple[object, ...], sentence: str
) -> None:
    outcome = distri("plan", *flags)
    assert sentence in outcome.complaint
    assert outcome.status == 2
    assert left_behind(tmp_path) == []


def test_nothing_is_written_when_the_plan_is_refused(distri: Distri, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("before")
    assert distri("plan", "--gpus", 0, "-o", "plan.json").status == 2
    assert (tmp_path / "plan.json").read_text() == "before"


def test_planning_imports_neither_torch_nor_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subprocess.run([sys.executable, "-m", "distri", "plan", "--gpus", "8"], check=True, capture_output=True)
    code = (
        "import sys; from distri.cli import main; main(['plan', '--gpus', '8']); "
        "heavy = {'torch', 'diffusers', 'scipy', 'simpy', 'networkx', 'numpy', 'pydantic'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def fastest(*command: str) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_planning_takes_at_most_half_the_time_of_importing_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fastest("-m", "distri", "plan", "--gpus", "8") <= 0.5 * fastest("-c", "import torch")
