"""`distri evaluate` on the demo model: small pictures, few steps."""

from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Distri

SMALL = ("--num-prompts", 1, "--height", 128, "--width", 128, "--steps", 4, "--warmup-steps", 1)
TABLE = """
base: corrected
rules:
  - {kind: moments, phase: steady, policy: fresh}
"""


def rows_of(distri: Distri, *arguments: object) -> dict[str, dict[str, object]]:
    outcome = distri("evaluate", *SMALL, "--json", *arguments)
    assert outcome.status == 0, outcome.err
    return {row["mode"]: row for row in outcome.value["rows"]}


def test_modes_stand_in_the_order_of_what_they_let_a_rank_know(distri: Distri, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(TABLE)
    modes = "full_sync,corrected,corrected+every=1,naive_patch,naive_patch@cols,sync_gn,own.yaml"
    rows = rows_of(distri, "--ranks", 2, "--modes", modes, "--sheet", "sheet.png")
    psnr = {mode: float(row["psnr_db"]) for mode, row in rows.items()}  # type: ignore[arg-type]
    assert list(rows) == modes.split(",")
    assert psnr["full_sync"] > 60
    assert psnr["full_sync"] > psnr["corrected+every=1"] > psnr["corrected"] > psnr["naive_patch"] + 3
    assert psnr["naive_patch"] != psnr["naive_patch@cols"]
    assert psnr["own.yaml"] == psnr["sync_gn"]
    assert rows["corrected"]["synchronous_steps"] == 1
    assert rows["corrected+every=1"]["synchronous_steps"] == 2
    assert rows["own.yaml"]["drift"] == rows["sync_gn"]["drift"]
    assert rows["corrected"]["drift"][0] < 1e-5 < rows["corrected"]["drift"][-1]  # type: ignore[index]
    assert float(rows["naive_patch"]["seam"]) > 1.5 * float(rows["full_sync"]["seam"])  # type: ignore[arg-type]
    assert int(rows["naive_patch"]["bytes_per_step"]) < int(rows["corrected"]["bytes_per_step"])  # type: ignore[call-overload]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width >= 128 * len(rows)


def test_the_same_noise_gives_the_same_figures_again(distri: Distri) -> None:
    first, second = (rows_of(distri, "--ranks", 2, "--modes", "corrected", "--seeds", "3") for _ in range(2))
    assert first == second


def test_every_sampler_number_of_steps_and_of_ranks_has_a_row(distri: Distri) -> None:
    arguments = ("--ranks", "2,3", "--samplers", "ddim,dpm-solver++", "--steps", "1,2", "--guidance-scale", 1)
    outcome = distri("evaluate", *SMALL, *arguments, "--modes", "local", "--json")
    found = {(row["ranks"], row["sampler"], row["steps"]) for row in outcome.value["rows"]}
    assert found == {(r, s, n) for r in (2, 3) for s in ("ddim", "dpm-solver++") for n in (1, 2)}
    assert len(outcome.value["rows"]) == len(found)


def test_each_picture_has_its_figures_and_a_row_their_mean_and_its_error(distri: Distri) -> None:
    arguments = ("--ranks", 2, "--modes", "local", "--seeds", "0,1")
    outcome = distri("evaluate", *SMALL, *arguments, "--json")
    (row,), pictures = outcome.value["rows"], outcome.value["pictures"]
    first, second = (picture["psnr_db"] for picture in pictures)
    assert [picture["seed"] for picture in pictures] == [0, 1]
    assert row["psnr_db"] == pytest.approx((first + second) / 2)
    assert row["psnr_error_db"] == pytest.approx(abs(first - second) / 2)
    shown = distri("evaluate", *SMALL, *arguments).out
    assert "128x128 pixels, 4 steps, ddim, 2 pictures a row" in " ".join(shown.split())
    assert f"{row['psnr_db']:.2f} │ {row['psnr_error_db']:.2f}" in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--modes", "correct"), "unknown policy 'correct'; known: corrected, "),
        (("--modes", "absent.yaml"), "absent.yaml"),
        (("--modes", "corrected+each=4"), "unknown refresh 'each'; known: every=K, above=X"),
        (("--modes", "corrected+every=x"), "a mode's refresh is a number"),
        (("--modes", "corrected@diagonal"), "unknown split 'diagonal'; known: rows, cols, grid, alternate"),
        (("--samplers", "ddpm"), "unknown sampler 'ddpm'; known: ddim, euler, dpm-solver++"),
        (("--model", "sdxl"), "--prompt is needed for a model other than demo"),
        (("--ranks", "x"), "x"),
        (("--sheet", "nowhere/sheet.png"), "there is no directory nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_line(
    distri: Distri, arguments: tuple[str, ...], complaint: str
) -> None:
    outcome = distri("evaluate", *SMALL, *arguments)
    assert outcome.status == 2
    assert complaint in outcome.complaint
