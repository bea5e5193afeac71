from fractions import Fraction

import pytest

from distri.core.graph import LayerGraph
from distri.core.partition import FIXED_AXES, SplitAxis
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import ExchangeKind, Policy, builtin_tables, policy_table
from distri.core.verify import verify
from distri.errors import PlanError

TERA = 1e12


def paper_plan(graph: LayerGraph, ranks: int, cfg_split: bool, policy: str = "corrected") -> Plan:
    image = ImageRequest(1280, 1920, 50)
    return make_plan(PlanRequest(image, ranks, cfg_split, policy_table(policy)), graph)


@pytest.mark.parametrize(
    ("ranks", "cfg_split", "policy", "published", "within"),
    [
        (1, False, "corrected", 907, 0.001),
        (4, False, "corrected", 227, 0.005),
        (4, False, "local", 190, 0.001),
        (8, True, "corrected", 113, 0.001),
    ],
)
def test_macs_of_sdxl_are_those_published(
    sdxl: LayerGraph, ranks: int, cfg_split: bool, policy: str, published: float, within: float
) -> None:
    plan = paper_plan(sdxl, ranks, cfg_split, policy)
    assert len(plan.macs_per_device) == ranks
    for macs in plan.macs_per_device:
        assert macs / TERA == pytest.approx(published, rel=within)


def test_macs_at_the_native_size_of_sdxl(sdxl: LayerGraph) -> None:
    plan = make_plan(PlanRequest(ImageRequest(1024, 1024, 50), 1), sdxl)
    assert plan.macs_per_device[0] / TERA == pytest.approx(338, rel=0.001)


def test_without_interaction_ranks_together_do_less_than_one_device(sdxl: LayerGraph) -> None:
    alone, local = paper_plan(sdxl, 1, False), paper_plan(sdxl, 4, False, "local")
    assert sum(local.macs_per_device) < alone.macs_per_device[0]


def test_displaced_ranks_do_what_one_device_does_but_project_the_text_once(sdxl: LayerGraph) -> None:
    alone, displaced = paper_plan(sdxl, 1, False), paper_plan(sdxl, 4, False)
    own = displaced.extent(0)
    text = sum(operation.macs(own) for operation in sdxl if operation.depends_on_text_only)
    per_step = (alone.macs_per_device[0] // 50 - text) // 4 + text
    assert displaced.macs_per_device[0] == pytest.approx(50 * per_step - 49 * text, rel=1e-4)


CASES = [("rows", name, 3) for name in builtin_tables()]
CASES += [(axis.value, "corrected", ranks) for axis in FIXED_AXES for ranks in (1, 2, 5, 8)]
CASES += [("alternate", "naive_patch", ranks) for ranks in (1, 2, 5, 8)]


@pytest.mark.parametrize(("split", "name", "ranks"), CASES)
def test_every_plan_that_is_made_can_be_trusted(demo: LayerGraph, ranks: int, split: str, name: str) -> None:
    axis = SplitAxis(split)
    plan = make_plan(
        PlanRequest(ImageRequest(512, 384, 12), ranks, policy=policy_table(name), axis=axis), demo
    )
    verify(plan, demo)


def test_the_same_request_makes_the_same_plan(demo: LayerGraph) -> None:
    request = PlanRequest(ImageRequest(512, 512, 25), 3, weights=(Fraction(3), Fraction(2), Fraction(1)))
    assert make_plan(request, demo) == make_plan(request, demo)


@pytest.mark.parametrize(
    ("ranks", "cfg_split", "guidance", "mesh"),
    [
        (8, None, True, (2, 4)),
        (8, False, True, (1, 8)),
        (3, None, True, (1, 3)),
        (8, None, False, (1, 8)),
        (1, None, True, (1, 1)),
    ],
)
def test_guidance_branches_are_split_if_asked_or_possible(
    demo: LayerGraph, ranks: int, cfg_split: bool | None, guidance: bool, mesh: tuple[int, int]
) -> None:
    plan = make_plan(PlanRequest(ImageRequest(512, 512, 25, guidance), ranks, cfg_split), demo)
    assert (plan.mesh.cfg, plan.mesh.patch) == mesh
    assert plan.batch_per_rank * plan.mesh.cfg == plan.image.batch


def test_policies_that_send_nothing_receive_only_the_output(demo: LayerGraph) -> None:
    for name in ("local", "no_sync"):
        plan = make_plan(PlanRequest(ImageRequest(512, 512, 25), 2, False, policy_table(name)), demo)
        output = plan.exchanges[-1]
        assert plan.elements_received_per_step == output.elements_received


def test_only_late_exchanges_travel_in_buckets(demo: LayerGraph) -> None:
    plan = make_plan(PlanRequest(ImageRequest(512, 512, 25), 2, False, policy_table("sync_gn")), demo)
    for exchange in plan.exchanges:
        assert (exchange.bucket is None) == (exchange.steady is Policy.FRESH)
    assert {e.kind for e in plan.exchanges if e.bucket is None} == {ExchangeKind.MOMENTS, ExchangeKind.OUTPUT}


def test_warmup_is_at_most_the_whole_run(demo: LayerGraph) -> None:
    plan = make_plan(PlanRequest(ImageRequest(512, 512, 3), 2, False, warmup_steps=9), demo)
    assert plan.warmup_steps == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_ranks": 0}, "at least 1 device is needed, not 0"),
        ({"num_ranks": -2}, "at least 1 device is needed, not -2"),
        ({"num_ranks": 3, "cfg_split": True}, "3 devices are not an even number; use --cfg-split off"),
        ({"cfg_split": True, "image": ImageRequest(512, 512, 9, guidance=False)}, "guidance is off"),
        ({"image": ImageRequest(512, 512, 0)}, "at least 1 denoising step is needed, not 0"),
        ({"warmup_steps": -1}, "the number of warm-up steps cannot be negative: -1"),
        (
            {"warmup_steps": 0, "cfg_split": False},
            "'corrected' reads the previous step, which step 0 does not have",
        ),
    ],
)
def test_impossible_requests_are_refused(demo: LayerGraph, change: dict[str, object], sentence: str) -> None:
    wanted = {"image": ImageRequest(512, 512, 25), "num_ranks": 2, **change}
    with pytest.raises(PlanError, match=sentence):
        make_plan(PlanRequest(**wanted), demo)
