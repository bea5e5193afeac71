from pathlib import Path

import pytest

from tests.cli.conftest import Distri


def test_the_list_names_every_machine(distri: Distri) -> None:
    outcome = distri("hardware", "list", "--json")
    names = {item["name"] for item in outcome.value["hardware"]}
    assert {"a100-sxm", "a100-pcie", "h100-sxm", "h200", "l40s", "rtx4090", "cpu-gloo"} <= names
    assert all(name in distri("hardware", "list").out for name in names)


def test_every_figure_is_shown_with_its_source(distri: Distri) -> None:
    outcome = distri("hardware", "show", "a100-sxm")
    assert outcome.status == 0
    for part in ("312.0 TFLOP/s", "data sheet", "nvswitch", "all_gather of 8", "compute_slowdown"):
        assert part in outcome.out
    numbers = [line.split(" ")[0] for line in outcome.out.splitlines() if line.startswith("(")]
    assert numbers == [f"({number + 1})" for number in range(len(numbers))]


def test_json_has_the_whole_machine(distri: Distri) -> None:
    value = distri("hardware", "show", "a100-sxm-2x8", "--hosts", 4, "--json").value
    assert len(value["devices"]) == 32
    assert value["num_hosts"] == 4


def test_a_sound_file_holds(distri: Distri, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "version: 1\nname: mine\ntitle: mine\nextends: a100-sxm\n", encoding="utf-8"
    )
    outcome = distri("hardware", "validate", "mine.yaml", "cpu-gloo")
    assert outcome.status == 0
    assert outcome.out.splitlines()[0].startswith("mine.yaml holds: 8 devices on 1 host, ")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("num_hosts: 0", "at least 1 is needed"),
        ("nonsense: 1", "unknown key"),
        ("extends: nothing-like-it", "unknown hardware 'nothing-like-it'"),
    ],
)
def test_an_unsound_file_is_refused_by_name(
    distri: Distri, tmp_path: Path, line: str, complaint: str
) -> None:
    text = f"version: 1\nname: mine\ntitle: mine\n{line}\n"
    if "extends" not in line:
        text += "extends: a100-sxm\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    outcome = distri("hardware", "validate", "mine.yaml")
    assert outcome.status == 2
    assert complaint in outcome.err
    assert distri("hardware", "validate", "a100-sxm", "mine.yaml", "--json").value["files"][1]["error"]


def test_an_unknown_machine_is_refused_in_one_line(distri: Distri) -> None:
    outcome = distri("hardware", "show", "b300")
    assert outcome.status == 2
    assert "unknown hardware 'b300'" in outcome.complaint
