"""The space of plans: layouts (who computes which part) times servings (how exchanges are served).

Layouts: guidance split or not; 1 to N patches, powers of two or not; rows, columns, grids; even and solved bands.
Servings: a policy for each kind of exchange, deep layers synchronous or not, wire formats, warm-up, size of buckets.
Everything is listed in a fixed order, so that the search is deterministic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product

from distri.core.codec import Codec
from distri.core.graph import LayerGraph
from distri.core.partition import SplitAxis
from distri.core.plan import ImageRequest
from distri.core.planner import LAYERS_PER_BUCKET, PlanRequest
from distri.core.policy import (
    READS_LATE,
    ExchangeKind,
    Phase,
    Policy,
    PolicyRule,
    PolicyTable,
    Reach,
    builtin_tables,
    policy_table,
    uniform_table,
)
from distri.core.shape import ceil_div
from distri.search.quality import risk_of
from distri.search.request import Limits, Risk

REACHES = (Reach(1, 2), Reach(1, 4))
CODECS = (Codec.NONE, Codec.INT8, Codec.FP8, Codec.RESIDUAL_INT8, Codec.RESIDUAL_INT4, Codec.RESIDUAL_INT2)


@dataclass(frozen=True)
class Layout:
    """Who computes which part. `devices` are ranks of the cluster, in the order in which the plan's ranks use them."""

    cfg: int
    patches: int
    axis: SplitAxis
    grid: tuple[int, int]
    units: tuple[int, ...] | None
    devices: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        """Devices that it takes."""
        return self.cfg * self.patches

    @property
    def complexity(self) -> tuple[int, int, int]:
        """What is simpler comes first: fewer devices, rows before columns before grids, even before uneven bands."""
        axes = (SplitAxis.ROWS, SplitAxis.COLS, SplitAxis.GRID)
        return self.num_ranks, axes.index(self.axis), 0 if self.units is None else 1

    def __str__(self) -> str:
        parts = []
        if self.cfg == 2:
            parts.append("guidance split")
        if self.patches > 1:
            shape = {SplitAxis.ROWS: "rows", SplitAxis.COLS: "columns"}.get(self.axis)
            down, across = self.grid
            parts.append(f"{self.patches} {shape}" if shape else f"{down}x{across} grid")
        if self.units is not None:
            parts.append("uneven")
        return " x ".join(parts[:2]) + (f" ({parts[2]})" if len(parts) > 2 else "") if parts else "1 device"


@dataclass(frozen=True)
class Structure:
    """How exchanges are served in the steady phase.

    deep: kinds that are fresh in the deepest layers. reach: far contexts that rest between refreshes.
    """

    halo: Policy
    moments: Policy
    context: Policy
    deep: tuple[ExchangeKind, ...] = ()
    reach: Reach | None = None

    def policy(self, kind: ExchangeKind, is_deep: bool) -> Policy:
        """The policy of one kind in one group of layers."""
        if is_deep and kind in self.deep:
            return Policy.FRESH
        return {"halo": self.halo, "moments": self.moments, "context": self.context}[kind.value]

    @property
    def is_late(self) -> bool:
        """Whether halos or contexts are read one step late, so that a codec makes sense."""
        return self.halo in READS_LATE or self.context in READS_LATE


@dataclass(frozen=True)
class Serving:
    """All that a plan says beside its layout."""

    structure: Structure
    warmup_steps: int
    layers_per_bucket: int = LAYERS_PER_BUCKET
    codec: Codec = Codec.NONE

    @property
    def steady(self) -> Serving:
        """The same but for the warm-up: what steady steps and memory depend on."""
        return dataclasses.replace(self, warmup_steps=1)


class Tables:
    """Policy tables of structures for one graph, by name where they have one."""

    def __init__(self, graph: LayerGraph) -> None:
        self.deep_blocks = deep_blocks(graph)
        self._named = {
            table.rules: table for table in (policy_table("partial"), *reversed(builtin_tables().values()))
        }
        self.of = lru_cache(maxsize=None)(self._of)

    def _of(self, structure: Structure, codec: Codec) -> PolicyTable:
        warmup = Policy.LOCAL if structure == ALL_LOCAL else Policy.FRESH
        base = uniform_table("", warmup, structure.halo, structure.moments, structure.context)
        rules = tuple(
            PolicyRule(r.kind, r.phase, r.policy, r.layers, codec) if _is_codable(r) else r
            for r in base.rules
        )
        if structure.reach is not None:
            resting = PolicyRule(ExchangeKind.CONTEXT, Phase.STEADY, Policy.STALE, reach=structure.reach)
            rules = (resting, *rules)
        named = self._named.get(rules)
        name = named.name if named else _name_of(structure, codec)
        if not structure.deep:
            return PolicyTable(name, rules)
        fresh = tuple(
            PolicyRule(kind, Phase.STEADY, Policy.FRESH, f"{block}.*")
            for kind in structure.deep
            for block in self.deep_blocks
        )
        deep = "+".join(kind.value for kind in structure.deep)
        return PolicyTable(f"{name}, fresh {deep} in deep layers", (*fresh, *rules))

    def measured_name(self, structure: Structure, codec: Codec) -> str:
        """The table whose measured quality stands for it: fresh layers can only help."""
        plain = Structure(structure.halo, structure.moments, structure.context, (), structure.reach)
        return self.of(plain, codec).name


def _is_codable(rule: PolicyRule) -> bool:
    kinds = (ExchangeKind.HALO, ExchangeKind.CONTEXT)
    return rule.phase is Phase.STEADY and rule.kind in kinds and rule.policy in READS_LATE


def _name_of(structure: Structure, codec: Codec) -> str:
    kinds = [f"{kind} {getattr(structure, kind).value}" for kind in ("halo", "moments", "context")]
    codecs = [] if codec is Codec.NONE else [codec.value]
    rests = [] if structure.reach is None else [f"far context every {structure.reach.every} steps"]
    return ", ".join(kinds + codecs + rests)


ALL_LOCAL = Structure(Policy.LOCAL, Policy.LOCAL, Policy.LOCAL)
ALL_FRESH = Structure(Policy.FRESH, Policy.FRESH, Policy.FRESH)


def deep_blocks(graph: LayerGraph) -> tuple[str, ...]:
    """The blocks whose every exchange is at the deepest level.

    A block is what the first two parts of a layer's path name: `down_blocks.2`, `mid_block.resnets`.
    """
    levels: dict[str, set[int]] = {}
    for operation in graph.exchanging:
        levels.setdefault(block_of(operation.path), set()).add(operation.level or 1)
    deepest = max((max(found) for found in levels.values()), default=1)
    if deepest == 1:
        return ()
    return tuple(block for block, found in levels.items() if found == {deepest})


def block_of(path: str) -> str:
    """The first two parts of a layer's path."""
    return ".".join(path.split(".")[:2])


def structures(max_risk: Risk, limits: Limits, tables: Tables) -> Iterator[Structure]:
    """All structures that do no more to the picture than `max_risk`, the plainest first."""
    fresh, stale, corrected, local = Policy.FRESH, Policy.STALE, Policy.CORRECTED, Policy.LOCAL
    kinds = (ExchangeKind.HALO, ExchangeKind.MOMENTS, ExchangeKind.CONTEXT)
    if max_risk is Risk.LOCAL:
        yield ALL_LOCAL
    is_bold = max_risk.order >= Risk.CODED.order
    late = (stale, Policy.EXTRAPOLATED) if is_bold else (stale,)
    for context, moments, halo in product((*late, fresh), (corrected, *late, fresh, local), (*late, fresh)):
        plain = Structure(halo, moments, context)
        if risk_of(tables.of(plain, Codec.NONE)).order > max_risk.order:
            continue
        yield plain
        if is_bold and context is stale:
            yield from (Structure(halo, moments, context, (), reach) for reach in REACHES)
        waiting = tuple(kind for kind in kinds if plain.policy(kind, False) not in (fresh, local))
        if limits.has_deep_rules and tables.deep_blocks and waiting:
            yield from (Structure(halo, moments, context, (kind,)) for kind in waiting)
            if len(waiting) > 1:
                yield Structure(halo, moments, context, waiting)


def codecs_of(structure: Structure, max_risk: Risk) -> tuple[Codec, ...]:
    """Wire formats that a structure may use."""
    can = structure.is_late and structure.reach is None and max_risk.order >= Risk.CODED.order
    return CODECS if can else CODECS[:1]


def buckets_of(structure: Structure, limits: Limits) -> tuple[int, ...]:
    """Sizes of buckets that differ for a structure."""
    late = any(p in READS_LATE for p in (structure.halo, structure.moments, structure.context))
    return limits.layers_per_bucket if late else limits.layers_per_bucket[-1:]


def warmups_of(structure: Structure, limits: Limits, steps: int) -> tuple[int, ...]:
    """Lengths of the warm-up; one is enough where warm-up and steady phase are alike."""
    if structure in (ALL_FRESH, ALL_LOCAL):
        return (min(limits.warmup_steps[0], steps),)
    return tuple(dict.fromkeys(min(count, steps) for count in limits.warmup_steps))


def grids(
    patches: int, rows: int, cols: int, axes: tuple[SplitAxis, ...]
) -> Iterator[tuple[SplitAxis, tuple[int, int]]]:
    """The ways to cut into so many patches, where there are `rows` x `cols` units to cut."""
    if patches == 1:
        yield SplitAxis.ROWS, (1, 1)
        return
    if SplitAxis.ROWS in axes and patches <= rows:
        yield SplitAxis.ROWS, (patches, 1)
    if SplitAxis.COLS in axes and patches <= cols:
        yield SplitAxis.COLS, (1, patches)
    if SplitAxis.GRID in axes:
        for across in range(2, patches // 2 + 1):
            down, rest = divmod(patches, across)
            if rest == 0 and down <= rows and across <= cols:
                yield SplitAxis.GRID, (down, across)


def has_idle_cuts(grid: tuple[int, int], units: tuple[int, int]) -> bool:
    """Whether the largest of even patches would be as small with one band of rows or of columns fewer.

    >>> has_idle_cuts((3, 1), (4, 4)), has_idle_cuts((4, 1), (4, 4))
    (True, False)
    """
    return any(
        n > 1 and ceil_div(size, n) == ceil_div(size, n - 1) for n, size in zip(grid, units, strict=True)
    )


def units_of(image: ImageRequest, graph: LayerGraph) -> tuple[int, int]:
    """Rows and columns that must stay together, counted."""
    alignment, _ = graph.alignment
    factor = graph.vae_factor
    return ceil_div(image.height // factor, alignment), ceil_div(image.width // factor, alignment)


def plan_request(
    layout: Layout, serving: Serving, image: ImageRequest, dtype: str, tables: Tables
) -> PlanRequest:
    """The request for exactly this plan."""
    return PlanRequest(
        image=image,
        num_ranks=layout.num_ranks,
        cfg_split=layout.cfg == 2,
        policy=tables.of(serving.structure, serving.codec),
        warmup_steps=serving.warmup_steps,
        axis=layout.axis,
        weights=None if layout.units is None else tuple(Fraction(count) for count in layout.units),
        grid=layout.grid if layout.axis is SplitAxis.GRID else None,
        dtype=dtype,
        layers_per_bucket=serving.layers_per_bucket,
    )
