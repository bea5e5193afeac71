"""Plans on disk: the same plan comes back, and whatever is not a sound plan is refused in one line."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from distri.config.plan import dump_plan, load_plan, parse_plan
from distri.core.partition import FIXED_AXES
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import ExchangeKind, Phase, Policy, PolicyRule, builtin_tables, policy_table
from distri.errors import PlanError
from distri.models.presets import load_graph

IMAGE = ImageRequest(512, 512, 25)


def plan_for(request: PlanRequest) -> Plan:
    return make_plan(request, load_graph("demo"))


REQUESTS = [PlanRequest(IMAGE, 3, policy=policy_table(name)) for name in builtin_tables()]
REQUESTS += [PlanRequest(IMAGE, ranks, axis=axis) for ranks in (1, 4) for axis in FIXED_AXES]
REQUESTS += [
    PlanRequest(ImageRequest(520, 264, 9, False), 3, weights=(Fraction(3), Fraction(1, 3), Fraction(2)))
]
RULE = PolicyRule(ExchangeKind.CONTEXT, Phase.STEADY, Policy.LOCAL, "mid_block.*")
REQUESTS += [PlanRequest(IMAGE, 2, False, policy_table("corrected").with_rules((RULE,)))]


@pytest.mark.parametrize("request_", REQUESTS)
def test_plan_to_json_to_plan_is_the_identity(request_: PlanRequest) -> None:
    plan = plan_for(request_)
    assert parse_plan(json.dumps(dump_plan(plan))) == plan


def test_the_object_has_what_readers_rely_on() -> None:
    body = dump_plan(plan_for(PlanRequest(IMAGE, 4)))
    names = ("macs_per_device", "elements_received_per_step", "bytes_received_per_step")
    assert all(len(body[name]) == 4 for name in names)
    assert body["mesh"] == {"cfg": 2, "patch": 2}
    assert body["bands"] == [{"rows": [0, 32], "cols": [0, 64]}, {"rows": [32, 64], "cols": [0, 64]}]
    assert body["exchanges"][-1]["kind"] == "output"


def edited(change: Callable[[dict[str, Any]], None]) -> str:
    body = dump_plan(plan_for(PlanRequest(IMAGE, 2, False)))
    change(body)
    return json.dumps(body)


EDITS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda b: b.update(schema_version=1), "this one is of schema 1"),
    (lambda b: b.update(schema_version="2"), "this one is of schema '2'"),
    (lambda b: b.pop("schema_version"), "a JSON object with a schema_version is required"),
    (lambda b: b.pop("hash"), "hash"),
    (lambda b: b.pop("mesh"), "not a plan: mesh: Field required"),
    (lambda b: b.update(mesh={"cfg": 3, "patch": 1}), "1 or 2 guidance branches, not 3"),
    (lambda b: b["mesh"].update(patch="many"), "not a plan: mesh.patch"),
    (lambda b: b["exchanges"][0].update(kind="gossip"), "not a plan: exchanges.0.kind"),
    (lambda b: b.update(warmup_steps=7), "it was edited"),
    (lambda b: b["bands"][0].update(rows=[0, 8]), "it was edited"),
    (lambda b: b.pop("bands"), "it was edited"),
    (lambda b: b.update(comment="mine"), "it was edited"),
    (lambda b: b["exchanges"][0].update(comment="mine"), "it was edited"),
]


@pytest.mark.parametrize(("change", "sentence"), EDITS)
def test_an_edited_plan_is_refused(change: Callable[[dict[str, Any]], None], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence) as caught:
        parse_plan(edited(change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a": 1}', "[" * 100_000, "1" * 10_000, "\x00"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        parse_plan(text)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_plan_is_refused(tmp_path: Path, share: float) -> None:
    text = edited(lambda _: None)
    path = tmp_path / "plan.json"
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(PlanError, match=r"plan\.json: not a plan"):
        load_plan(path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x80PK")
    with pytest.raises(PlanError, match="it is not text"):
        load_plan(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json: cannot be read: No such file"):
        load_plan(tmp_path / "none.json")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path)
