import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import distri as package
from tests.cli.conftest import Distri, left_behind

ROOT = Path(package.__file__).parent.parent

KEYS = {
    "latency_s", "speedup", "exposed_communication_s", "bytes_on_link", "memory_bytes", "critical_path", "tags",
    "assumptions",
}  # fmt: skip
DEMO = ("simulate", "--model", "demo", "--num-inference-steps", 6)


def test_json_has_what_was_promised(distri: Distri) -> None:
    value = distri("simulate", "--gpus", 8, "--cfg-split", "off", "--json").value
    assert value.keys() >= KEYS
    assert 1.0 < value["latency_s"] < 3.0
    assert value["speedup"] == pytest.approx(value["original_s"] / value["latency_s"])
    assert len(value["memory_bytes"]) == 8
    assert value["warnings"] == []


def test_the_same_question_has_the_same_answer(distri: Distri) -> None:
    first, second = (distri(*DEMO, "--gpus", 4, "--json").out for _ in range(2))
    assert first == second


def test_a_plan_from_a_file_is_the_plan_of_its_flags(distri: Distri) -> None:
    flags = ("--gpus", 4, "--cfg-split", "off", "--policy", "stale")
    distri("plan", "--model", "demo", *flags, "-o", "plan.json")
    from_file = distri("simulate", "plan.json", "--json").value
    assert from_file == distri("simulate", "--model", "demo", *flags, "--json").value


def test_methods_come_in_the_published_order(distri: Distri) -> None:
    def latency(method: str) -> float:
        value = distri(
            "simulate",
            "--gpus",
            8,
            "--cfg-split",
            "off",
            "--method",
            method,
            "--pattern",
            "gather_all",
            "--json",
        ).value
        return float(value["latency_s"])

    order = ("no_communication", "displaced", "full_sync", "tensor_parallel")
    times = [latency(method) for method in order]
    assert times == sorted(times)
    assert len(set(times)) == 4


def test_the_table_says_what_matters(distri: Distri) -> None:
    outcome = distri("simulate", "--gpus", 2)
    assert outcome.status == 0
    for part in (
        "time of the run",
        "speed-up",
        "busiest link carries",
        "Critical path",
        "Assumed: ",
        "fitted",
    ):
        assert part in outcome.out
    assert "\x1b" not in outcome.out


def test_it_says_plainly_when_one_device_is_faster(distri: Distri) -> None:
    flags = ("--gpus", 8, "--cfg-split", "off", "--method", "full_sync", "--hardware", "rtx4090")
    value = distri("simulate", *flags, "--json").value
    assert value["speedup"] < 1
    assert value["warnings"][0].startswith("This is slower than one device alone: ")
    assert "This is slower than one device alone" in distri("simulate", *flags).out


def test_it_names_the_layer_at_the_peak_where_memory_does_not_suffice(distri: Distri) -> None:
    flags = ("--height", 8192, "--width", 8192, "--hardware", "rtx4090")
    value = distri("simulate", *flags, "--json").value
    assert not value["memory"][0]["fits"]
    (warning,) = value["warnings"]
    assert warning.startswith("This does not fit in memory: rank 0 needs ")
    assert value["memory"][0]["peak_layer"] in warning
    assert "This does not fit in memory" in " ".join(distri("simulate", *flags).out.split())


def test_what_lies_outside_of_the_denoiser_is_added(distri: Distri) -> None:
    plain = distri(*DEMO, "--json").value["latency_s"]
    more = distri(*DEMO, "--before", 0.5, "--after", 0.25, "--per-step", 0.125, "--json").value["latency_s"]
    assert more == pytest.approx(plain + 0.5 + 0.25 + 6 * 0.125)


def test_noise_gives_an_interval_around_it(distri: Distri) -> None:
    value = distri(*DEMO, "--gpus", 2, "--noise", 0.05, "--json").value
    low, high = value["interval_s"]
    assert low < high
    assert low < 1.1 * value["latency_s"]


def test_pictures_are_written_whole(distri: Distri, tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    outcome = distri(*DEMO, "--gpus", 2, "--trace", "t.json", "--html", "r.html", "--trace-dir", "ranks")
    assert outcome.status == 0
    assert left_behind(tmp_path) == ["r.html", "ranks/rank0.json", "ranks/rank1.json", "t.json"]
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    needed = max(event["args"]["MB"] for event in events if event["name"] == "memory")
    memory = distri(*DEMO, "--gpus", 2, "--json").value["memory_bytes"]
    assert needed == pytest.approx(max(memory) / 1e6)
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--gpus", 9, "--cfg-split", "off"), "the plan is for 9 devices, a100-sxm has 8"),
        (("--method", "original", "--gpus", 2), "method 'original' is for 1 device, not 2"),
        (("--hardware", "b300"), "unknown hardware 'b300'"),
        (("--noise", 2), "noise is a share"),
        (("--per-step", -1), "cannot be negative"),
        (("--gpus", 2, "--method", "full_sync", "--policy", "stale"), "--policy goes with displaced"),
        (("--profile", "none.json"), "none.json: cannot be read"),
        (("--html", "nowhere/r.html"), "there is no directory nowhere"),
        (("--trace-dir", "nowhere"), "there is no such directory"),
        (("no-plan.json",), "no-plan.json: cannot be read"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_line(
    distri: Distri, flags: tuple[object, ...], complaint: str
) -> None:
    outcome = distri("simulate", *flags)
    assert outcome.status == 2
    assert complaint in outcome.complaint


def test_a_method_contradicts_a_plan_that_has_its_own(distri: Distri) -> None:
    distri("plan", "--model", "demo", "--gpus", 2, "-o", "plan.json")
    outcome = distri("simulate", "plan.json", "--method", "full_sync")
    assert outcome.status == 2
    assert "--method belongs to the plan in plan.json" in outcome.complaint


def test_published_figures_are_predicted(distri: Distri) -> None:
    value = distri("validate", "--json").value
    assert value["mean_absolute_error"] <= 0.05
    assert value["worst"] <= 0.12
    assert sum(row["used"] for row in value["rows"]) <= 4
    assert "mean absolute error" in distri("validate").out


def test_the_page_of_validations_is_what_the_command_writes(distri: Distri, tmp_path: Path) -> None:
    distri("validate", "-o", "validation.md")
    page = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    written = (tmp_path / "validation.md").read_text(encoding="utf-8")
    assert page == written, "write it again: distri validate -o docs/validation.md"


def test_calibration_prints_its_points_and_residuals(distri: Distri) -> None:
    key = "1024x1024, 50 steps, 1 GPUs, original: latency"
    value = distri("calibrate", "--point", key, "--parameter", "compute.kernel_gap_s", "--json").value
    (point,) = value["points"]
    assert point["case"] == key
    assert abs(point["error"]) < 0.01
    assert value["parameters"].keys() == {"compute.kernel_gap_s"}
    outcome = distri("calibrate", "--point", "no such row")
    assert outcome.status == 2
    assert "no row is called 'no such row'" in outcome.complaint


SCRIPT = """
import sys
from distri.cli import main
status = main(sys.argv[1:])
heavy = [name for name in ("torch", "scipy", "diffusers", "transformers", "pandas") if name in sys.modules]
sys.exit(f"imported {heavy}" if heavy else status)
"""


def test_a_prediction_imports_nothing_heavy() -> None:
    command = [sys.executable, "-c", SCRIPT, "simulate", "--gpus", "8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_prediction_takes_two_seconds_of_processor() -> None:
    """CPU time of the whole process: other work on the machine must not decide."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "distri", "simulate", "--gpus", "8", "--cfg-split", "off", "--json"]
    start = time.monotonic()
    subprocess.run(command, capture_output=True, cwd=ROOT, timeout=120, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert min(spent, time.monotonic() - start) < 2.0
