"""Policies: how each kind of exchange is served in each phase, as a table that can be printed and compared.

The published synchronisation modes (DistriFusion, section 4 and its ablation) are named tables, not branches in layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from distri.core.codec import Codec
from distri.errors import PolicyError


class ExchangeKind(str, Enum):
    """What a layer needs from other ranks."""

    HALO = "halo"
    MOMENTS = "moments"
    CONTEXT = "context"
    OUTPUT = "output"


class Phase(str, Enum):
    """Warm-up (the first steps) or steady state (all later ones)."""

    WARMUP = "warmup"
    STEADY = "steady"


class Policy(str, Enum):
    """How one exchange is served at one step.

    FRESH: wait for this step's value. STALE: use the previous step's. CORRECTED: GroupNorm only, the previous step's
    moments of the others with this rank's own change applied. SHIFTED: GroupNorm only, the previous step's global
    moments moved by this rank's own change, as if all had changed alike. EXTRAPOLATED: carried forward to this step
    from the last three versions. FROZEN: the last warm-up step's value, nothing is sent. LOCAL: no remote data; an
    output that is local still reaches the rank of the other guidance branch that has the same patch.
    """

    FRESH = "fresh"
    STALE = "stale"
    CORRECTED = "corrected"
    SHIFTED = "shifted"
    EXTRAPOLATED = "extrapolated"
    FROZEN = "frozen"
    LOCAL = "local"


READS_LATE = (Policy.STALE, Policy.CORRECTED, Policy.SHIFTED, Policy.EXTRAPOLATED)
"""The policies whose values are sent a step ahead, behind computation."""


@dataclass(frozen=True)
class Reach:
    """Partial context: neighbours up to `near` places away send every step, the others every `every` steps."""

    near: int = 1
    every: int = 4

    def __post_init__(self) -> None:
        if self.near < 0 or self.every < 1:
            raise PolicyError(
                f"a reach has near >= 0 and every >= 1, not near {self.near} and every {self.every}"
            )


@dataclass(frozen=True)
class PolicyRule:
    """One line of a table: the first rule that matches decides. `codec` is how late values are written on the wire."""

    kind: ExchangeKind
    phase: Phase
    policy: Policy
    layers: str = "*"
    codec: Codec = Codec.NONE
    reach: Reach | None = None

    def __post_init__(self) -> None:
        if self.reach is not None and (
            self.kind is not ExchangeKind.CONTEXT
            or self.policy is not Policy.STALE
            or self.codec is not Codec.NONE
        ):
            raise PolicyError("a reach is for stale context without a codec")
        if self.policy in (Policy.CORRECTED, Policy.SHIFTED) and self.kind is not ExchangeKind.MOMENTS:
            raise PolicyError(f"policy {self.policy.value!r} is for moments, not for {self.kind.value}")
        if self.phase is Phase.WARMUP and self.policy not in (Policy.FRESH, Policy.LOCAL):
            raise PolicyError(f"during warm-up an exchange is fresh or local, not {self.policy.value}")
        if self.codec is not Codec.NONE and (
            self.kind not in (ExchangeKind.HALO, ExchangeKind.CONTEXT) or self.policy not in READS_LATE
        ):
            raise PolicyError(
                f"codec {self.codec.value!r} is for halo and context that are read one step late"
            )
        if self.kind is ExchangeKind.OUTPUT and self.policy not in (Policy.FRESH, Policy.LOCAL):
            raise PolicyError(
                "the output is gathered fresh at every step, or is local where the latent stays on its patch"
            )


@dataclass(frozen=True)
class PolicyTable:
    """Rules in order of precedence; every (kind, phase, layer) must be decided."""

    name: str
    rules: tuple[PolicyRule, ...]

    def rule(self, kind: ExchangeKind, phase: Phase, layer: str) -> PolicyRule:
        """The rule that decides one exchange of one layer.

        Raises:
            PolicyError: no rule decides it.
        """
        for rule in self.rules:
            if rule.kind is kind and rule.phase is phase and fnmatchcase(layer, rule.layers):
                return rule
        raise PolicyError(
            f"policy table {self.name!r} has no rule for {kind.value} of {layer} in {phase.value}"
        )

    def policy(self, kind: ExchangeKind, phase: Phase, layer: str) -> Policy:
        """The policy of one exchange of one layer; raises as `rule`."""
        return self.rule(kind, phase, layer).policy

    def with_rules(self, rules: tuple[PolicyRule, ...]) -> PolicyTable:
        """This table with further rules that take precedence."""
        return PolicyTable(self.name if not rules else f"{self.name}+", (*rules, *self.rules))


def uniform_table(
    name: str, warmup: Policy, halo: Policy, moments: Policy, context: Policy, codec: Codec = Codec.NONE
) -> PolicyTable:
    """A table that treats every layer alike; `codec` is for halo and context."""
    steady = {ExchangeKind.HALO: halo, ExchangeKind.MOMENTS: moments, ExchangeKind.CONTEXT: context}
    rules = [PolicyRule(kind, Phase.WARMUP, warmup) for kind in steady]
    for kind, policy in steady.items():
        own_codec = Codec.NONE if kind is ExchangeKind.MOMENTS else codec
        rules.append(PolicyRule(kind, Phase.STEADY, policy, codec=own_codec))
    rules += [PolicyRule(ExchangeKind.OUTPUT, phase, Policy.FRESH) for phase in Phase]
    return PolicyTable(name, tuple(rules))


def partial_table(reach: Reach) -> PolicyTable:
    """`corrected` with far context only every few steps."""
    far_rests = PolicyRule(ExchangeKind.CONTEXT, Phase.STEADY, Policy.STALE, reach=reach)
    return PolicyTable("partial", (far_rests, *builtin_tables()["corrected"].rules))


CODED = tuple(codec for codec in Codec if codec is not Codec.NONE)


def builtin_tables() -> dict[str, PolicyTable]:
    """The tables that have a name: ours first, then the published modes."""
    fresh, stale, corrected, local = Policy.FRESH, Policy.STALE, Policy.CORRECTED, Policy.LOCAL
    frozen, ahead = Policy.FROZEN, Policy.EXTRAPOLATED
    tables = (
        uniform_table("corrected", fresh, stale, corrected, stale),
        uniform_table("stale", fresh, stale, stale, stale),
        uniform_table("fresh", fresh, fresh, fresh, fresh),
        uniform_table("local", local, local, local, local),
        uniform_table("corrected_async_gn", fresh, stale, corrected, stale),
        uniform_table("stale_gn", fresh, stale, stale, stale),
        uniform_table("separate_gn", fresh, stale, local, stale),
        uniform_table("sync_gn", fresh, stale, fresh, stale),
        uniform_table("full_sync", fresh, fresh, fresh, fresh),
        uniform_table("no_sync", fresh, frozen, frozen, frozen),
        uniform_table("naive_patch", local, local, local, local),
        uniform_table("shifted_gn", fresh, stale, Policy.SHIFTED, stale),
        uniform_table("extrapolated_gn", fresh, stale, ahead, stale),
        uniform_table("extrapolated", fresh, ahead, ahead, ahead),
        *(uniform_table(codec.value, fresh, stale, corrected, stale, codec) for codec in CODED),
        *(uniform_table(f"extrapolated_{codec.value}", fresh, ahead, ahead, ahead, codec) for codec in CODED),
    )
    return {table.name: table for table in tables}


def table_names() -> tuple[str, ...]:
    """What `policy_table` knows."""
    return (*builtin_tables(), "partial")


def policy_table(name: str) -> PolicyTable:
    """A built-in table by name.

    Raises:
        PolicyError: there is none of that name.
    """
    if name == "partial":
        return partial_table(Reach())
    tables = builtin_tables()
    if name not in tables:
        raise PolicyError(f"unknown policy {name!r}; known: {', '.join(table_names())}")
    return tables[name]
