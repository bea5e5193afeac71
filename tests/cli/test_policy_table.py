"""`--policy-table`: a user's own rules reach the plan, and a run from that plan needs the file no more."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Distri

RULES = 'base: stale\nrules:\n- {kind: context, phase: steady, policy: local, layers: "up_blocks.*"}\n'
PLAN = ("plan", "--model", "demo", "--gpus", 2, "--cfg-split", "off", "--json")


def test_rules_from_a_file_are_in_the_plan(distri: Distri, tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text(RULES)
    outcome = distri(*PLAN, "--policy-table", "table.yaml")
    assert outcome.status == 0, outcome.err
    served = {e["layer"]: e["steady"] for e in outcome.value["exchanges"] if e["kind"] == "context"}
    assert {served[layer] for layer in served if layer.startswith("up_blocks.")} == {"local"}
    assert {served[layer] for layer in served if not layer.startswith("up_blocks.")} == {"stale"}
    assert outcome.value["policy"]["name"] == "stale+"


def test_a_table_that_is_wrong_is_one_line_and_status_2(distri: Distri, tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text("rules:\n- {kind: halo, phase: steady, policy: gone}\n")
    outcome = distri(*PLAN, "--policy-table", "table.yaml")
    assert outcome.status == 2
    assert "line 2: rules[0].policy: Input should be 'fresh'" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_two_tables_to_build_on_are_refused(distri: Distri, tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text(RULES)
    assert distri(*PLAN, "--policy", "stale", "--policy-table", "table.yaml").status == 0
    outcome = distri(*PLAN, "--policy", "fresh", "--policy-table", "table.yaml")
    assert outcome.status == 2
    assert "the file builds on stale, but fresh was asked for" in outcome.err
