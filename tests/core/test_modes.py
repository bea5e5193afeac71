"""The published modes: each is a policy table, means what was published, and is known to no layer by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import distri
from distri.core.partition import SplitAxis
from distri.core.policy import ExchangeKind, Phase, Policy, builtin_tables, policy_table
from distri.core.program import InstructionKind, step_program
from distri.errors import PlanError
from tests.toys import ToyShape, inputs_of, run_in_process, run_single, toy, toy_plan

FRESH, STALE, LOCAL, FROZEN = Policy.FRESH, Policy.STALE, Policy.LOCAL, Policy.FROZEN
KINDS = (ExchangeKind.HALO, ExchangeKind.MOMENTS, ExchangeKind.CONTEXT)

PUBLISHED = {
    # name: warm-up, then halo, moments and context afterwards
    "full_sync": (FRESH, FRESH, FRESH, FRESH),
    "corrected_async_gn": (FRESH, STALE, Policy.CORRECTED, STALE),
    "stale_gn": (FRESH, STALE, STALE, STALE),
    "separate_gn": (FRESH, STALE, LOCAL, STALE),
    "sync_gn": (FRESH, STALE, FRESH, STALE),
    "no_sync": (FRESH, FROZEN, FROZEN, FROZEN),
    "naive_patch": (LOCAL, LOCAL, LOCAL, LOCAL),
}
OURS = {"full_sync": "fresh", "corrected_async_gn": "corrected", "stale_gn": "stale", "naive_patch": "local"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_mode_is_a_table_with_the_published_meaning(name: str) -> None:
    warmup, *steady = PUBLISHED[name]
    table = policy_table(name)
    assert [table.policy(kind, Phase.WARMUP, "any") for kind in KINDS] == [warmup] * 3
    assert [table.policy(kind, Phase.STEADY, "any") for kind in KINDS] == steady
    assert all(table.policy(ExchangeKind.OUTPUT, phase, "any") is FRESH for phase in Phase)


@pytest.mark.parametrize(("published", "ours"), OURS.items())
def test_a_mode_that_has_a_name_of_ours_is_the_same_table(published: str, ours: str) -> None:
    assert policy_table(published).rules == policy_table(ours).rules


def test_no_layer_and_no_backend_knows_a_mode_by_its_name() -> None:
    """A mode is a table: what serves exchanges never compares names."""
    root = Path(distri.__file__).parent
    named = re.compile("|".join(rf"['\"]{name}['\"]" for name in builtin_tables()))
    files = [*(root / "nn").rglob("*.py"), *(root / "backends").rglob("*.py"), root / "session.py"]
    files += [
        root / "core" / f"{name}.py" for name in ("exchanger", "program", "staleness", "traffic", "verify")
    ]
    for file in files:
        assert not named.search(file.read_text(encoding="utf-8")), file.name


def served(name: str, step: int) -> set[tuple[str, InstructionKind]]:
    _, graph = toy()
    plan = toy_plan(graph, 3, policy=name, steps=6, warmup_steps=2)
    return {
        (plan.exchanges[i.exchange].kind.value, i.kind)
        for i in step_program(plan, step)
        if i.kind in (InstructionKind.PUBLISH, InstructionKind.AWAIT)
    }


PUBLISH, AWAIT = InstructionKind.PUBLISH, InstructionKind.AWAIT


def test_no_sync_is_silent_after_warm_up_and_reads_what_it_has() -> None:
    assert served("no_sync", 1) == {(kind.value, does) for kind in KINDS for does in (PUBLISH, AWAIT)}
    assert served("no_sync", 3) == {(kind.value, AWAIT) for kind in KINDS}


def test_separate_gn_leaves_the_moments_out() -> None:
    assert {kind for kind, _ in served("separate_gn", 3)} == {"halo", "context"}
    assert {kind for kind, _ in served("separate_gn", 0)} == {"halo", "moments", "context"}


def test_naive_patch_exchanges_nothing_at_any_step() -> None:
    assert served("naive_patch", 0) == served("naive_patch", 3) == set()


def test_sync_gn_has_the_true_moments_at_every_step() -> None:
    """Where GroupNorm is the only exchange left, it is the single device."""
    model, graph = toy(ToyShape(kernel=(1, 1), attention=False))
    with torch.no_grad():
        model.conv_out.weight[:, :, [0, 2]] = 0  # the last halo plays no part
    for name, is_exact in (("sync_gn", True), ("stale_gn", False)):
        plan = toy_plan(graph, 3, policy=name, steps=4)
        pairs = zip(run_in_process(model, plan), run_single(model, plan), strict=True)
        differences = [float((ours - theirs).abs().max()) for ours, theirs in pairs]
        assert (max(differences) < 2e-5) is is_exact


@pytest.mark.parametrize("axis", list(SplitAxis))
@torch.no_grad()
def test_naive_patch_draws_each_patch_as_a_picture_of_its_own(axis: SplitAxis) -> None:
    """By rows, by columns, both, or by turns: the unmodified model on what is cut out."""
    model, graph = toy()
    plan = toy_plan(graph, 4, policy="naive_patch", axis=axis, steps=3)
    for step, ours in enumerate(run_in_process(model, plan)):
        given = inputs_of(plan, step)
        for patch in plan.partition.at_step(step):
            place = (..., slice(*patch.rows), slice(*patch.cols))
            alone = model(**{**given, "sample": given["sample"][place]})[0]
            assert torch.allclose(ours[place], alone, atol=1e-5)


def test_alternate_is_rows_at_even_steps_and_columns_at_odd_ones() -> None:
    _, graph = toy()
    rows, cols, both = (
        toy_plan(graph, 4, policy="naive_patch", axis=axis, steps=5)
        for axis in (SplitAxis.ROWS, SplitAxis.COLS, SplitAxis.ALTERNATE)
    )
    patches = [both.partition.at_step(step) for step in range(5)]
    assert patches == [(rows, cols)[step % 2].partition.patches for step in range(5)]
    per_step = [(r // 5, c // 5) for r, c in zip(rows.macs_per_device, cols.macs_per_device, strict=True)]
    assert both.macs_per_device == tuple(3 * r + 2 * c for r, c in per_step)


@pytest.mark.parametrize("policy", ["corrected", "fresh", "no_sync", "separate_gn"])
def test_patches_that_move_go_with_no_policy_that_exchanges_anything(policy: str) -> None:
    _, graph = toy()
    with pytest.raises(PlanError, match="use it with --policy naive_patch"):
        toy_plan(graph, 4, policy=policy, axis=SplitAxis.ALTERNATE)
