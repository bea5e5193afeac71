import pytest

from distri.core.policy import (
    ExchangeKind,
    Phase,
    Policy,
    PolicyRule,
    PolicyTable,
    builtin_tables,
    policy_table,
)
from distri.errors import PolicyError


@pytest.mark.parametrize("name", builtin_tables())
def test_builtin_tables_decide_every_exchange_in_every_phase(name: str) -> None:
    table = policy_table(name)
    for kind in ExchangeKind:
        for phase in Phase:
            assert isinstance(table.policy(kind, phase, "any.layer"), Policy)


def test_earlier_rules_take_precedence_and_match_layers_by_pattern() -> None:
    rule = PolicyRule(ExchangeKind.CONTEXT, Phase.STEADY, Policy.LOCAL, "mid_block.*")
    table = policy_table("corrected").with_rules((rule,))
    assert table.policy(ExchangeKind.CONTEXT, Phase.STEADY, "mid_block.attn1") is Policy.LOCAL
    assert table.policy(ExchangeKind.CONTEXT, Phase.STEADY, "up_block.attn1") is Policy.STALE
    assert table.name == "corrected+"


def test_an_unknown_table_is_refused_naming_the_known_ones() -> None:
    with pytest.raises(PolicyError, match="unknown policy 'fastest'; known: corrected, stale, fresh, local"):
        policy_table("fastest")


def test_an_undecided_exchange_is_refused() -> None:
    with pytest.raises(PolicyError, match="'empty' has no rule for halo of conv in steady"):
        PolicyTable("empty", ()).policy(ExchangeKind.HALO, Phase.STEADY, "conv")


@pytest.mark.parametrize(
    ("kind", "phase", "policy", "sentence"),
    [
        (ExchangeKind.HALO, Phase.STEADY, Policy.CORRECTED, "'corrected' is for moments, not for halo"),
        (
            ExchangeKind.HALO,
            Phase.WARMUP,
            Policy.STALE,
            "during warm-up an exchange is fresh or local, not stale",
        ),
        (ExchangeKind.OUTPUT, Phase.STEADY, Policy.STALE, "the output is gathered fresh at every step"),
    ],
)
def test_rules_that_make_no_sense_are_refused(
    kind: ExchangeKind, phase: Phase, policy: Policy, sentence: str
) -> None:
    with pytest.raises(PolicyError, match=sentence):
        PolicyRule(kind, phase, policy)
