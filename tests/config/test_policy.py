"""Policy tables of a user's own: the rules come first, the base decides the rest, and slips are named by their line."""

from __future__ import annotations

from pathlib import Path

import pytest

from distri.config.policy import load_policy_table
from distri.core.codec import Codec
from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import ExchangeKind, Phase, Policy, policy_table
from distri.core.verify import verify
from distri.errors import PolicyError
from distri.models.presets import load_graph

GRAPH = load_graph("demo")

MINE = """
base: corrected
name: local middle
rules:
  - {kind: context, phase: steady, policy: local, layers: "mid_block.*"}
  - {kind: halo, phase: steady, policy: stale, codec: residual_int4}
"""


def table_of(tmp_path: Path, text: str, base: str = "corrected"):
    path = tmp_path / "table.yaml"
    path.write_text(text, encoding="utf-8")
    return load_policy_table(path, base, GRAPH)


def test_rules_decide_first_and_the_base_decides_the_rest(tmp_path):
    table = table_of(tmp_path, MINE)
    plan = make_plan(PlanRequest(ImageRequest(512, 512, 5), 2, False, table, 1), GRAPH)
    verify(plan, GRAPH)
    assert plan.policy.name == "local middle"
    for exchange in plan.exchanges:
        if exchange.kind is ExchangeKind.CONTEXT:
            wanted = Policy.LOCAL if exchange.layer.startswith("mid_block.") else Policy.STALE
            assert exchange.steady is wanted
        if exchange.kind is ExchangeKind.HALO:
            assert (exchange.steady, exchange.codec) == (Policy.STALE, Codec.RESIDUAL_INT4)
        if exchange.kind is ExchangeKind.MOMENTS:
            assert exchange.steady is Policy.CORRECTED
        assert exchange.warmup is Policy.FRESH


def test_without_a_base_the_rules_stand_on_the_table_that_was_asked_for(tmp_path):
    rules = "rules:\n- {kind: halo, phase: steady, policy: fresh}\n"
    table = table_of(tmp_path, rules, base="no_sync")
    assert table.name == "no_sync+"
    assert table.policy(ExchangeKind.CONTEXT, Phase.STEADY, "any") is Policy.FROZEN
    other = table_of(tmp_path, "base: stale\n" + rules, base="corrected")
    assert other.rules[1:] == policy_table("stale").rules


RULE = "{kind: halo, phase: steady, policy: stale"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not a policy table"),
        ("- 1", "not a policy table"),
        ("base: corrected", "line 1: rules: a list of at least one rule is required"),
        ("rules: []", "a list of at least one rule is required"),
        ("rules: [7]", r"rules\[0\]: a rule names kind, phase and policy"),
        (
            "rules:\n- {kind: gossip, phase: steady, policy: stale}",
            r"line 2: rules\[0\].kind: Input should be 'halo'",
        ),
        ("rules:\n- {kind: halo, phase: steady}", r"line 2: rules\[0\].policy: Field required"),
        (
            f"rules:\n- {RULE}}}\n- {RULE}, layer: x}}",
            r"line 3: rules\[1\].layer: unknown field; a rule has kind",
        ),
        (
            "rules:\n- {kind: halo, phase: steady, policy: corrected}",
            "'corrected' is for moments, not for halo",
        ),
        ("rules:\n- {kind: output, phase: steady, policy: stale}", "the output is gathered fresh"),
        ("rules:\n- {kind: output, phase: steady, policy: local}", "no rule's business; use --latent patch"),
        (f"rules:\n- {RULE}, codec: zip}}", r"rules\[0\].codec: Input should be 'none'"),
        (
            f"rules:\n- {RULE}, layers: 'mid_blok.*'}}",
            "no layer of demo that matches 'mid_blok.*' has a halo",
        ),
        (f"base: fastest\nrules:\n- {RULE}}}", "line 1: base: unknown policy 'fastest'; known: corrected"),
        (f"base: 3\nrules:\n- {RULE}}}", "base: the name of a table is required"),
        (f"name: stale\nrules:\n- {RULE}}}", "'stale' is the name of a built-in table; choose another"),
        (f"name: [a]\nrules:\n- {RULE}}}", "name: a line of text is required"),
        (f"bases: stale\nrules:\n- {RULE}}}", "bases: unknown field; known: base, name, rules"),
        ("rules:\n- {kind: halo, phase: steady, policy: stale, layers: *}", "line 2"),
        ("rules: {", "not valid YAML"),
        (f"rules:\n- {RULE}, policy: fresh}}", "the key is given twice"),
    ],
)
def test_what_is_no_policy_table_is_refused_by_its_line(tmp_path, text, sentence):
    with pytest.raises(PolicyError, match=sentence) as caught:
        table_of(tmp_path, text)
    assert "table.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_many_rules_are_refused(tmp_path):
    with pytest.raises(PolicyError, match="1001 rules; at most 1000 are read"):
        table_of(tmp_path, "rules:\n" + f"- {RULE}}}\n" * 1001)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(PolicyError, match=r"none\.yaml: the file cannot be read"):
        load_policy_table(tmp_path / "none.yaml", "corrected", GRAPH)
