"""An exchanger against a transport that only writes down what it is asked for."""

from collections.abc import Sequence

import pytest

from distri.core.exchanger import Exchanger
from distri.core.graph import LayerGraph
from distri.core.plan import Exchange, ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import ExchangeKind, policy_table
from distri.errors import ScheduleMismatchError


class Notebook:
    def __init__(self) -> None:
        self.sent: list[tuple[str, int, int | None]] = []
        self.read: list[tuple[str, int]] = []
        self.images = 0

    def begin_image(self) -> None:
        self.images += 1

    def place(self, exchange: Exchange, version: int, bucket: int | None) -> str:
        return f"{exchange.layer}, {version}, {bucket}"

    def send(self, exchange: Exchange, version: int, parts: Sequence[str], bucket: int | None) -> None:
        self.sent.append((exchange.layer, version, bucket))

    def receive(self, exchange: Exchange, version: int, own: Sequence[str]) -> Sequence[str]:
        self.read.append((exchange.layer, version))
        return own

    def gather(self, exchange: Exchange, version: int, own: str) -> Sequence[str]:
        return [own]


def plan_for(graph: LayerGraph, policy: str = "corrected", steps: int = 4) -> Plan:
    request = PlanRequest(ImageRequest(512, 512, steps), 3, policy=policy_table(policy), warmup_steps=1)
    return make_plan(request, graph)


def layers_of(plan: Plan) -> list[str]:
    return [exchange.layer for exchange in plan.exchanges if exchange.kind is not ExchangeKind.OUTPUT]


def run_step(exchanger: Exchanger[str], layers: Sequence[str]) -> None:
    exchanger.begin_step()
    for layer in layers:
        exchanger.publish(layer, ["own"])
        exchanger.collect(layer)


def test_layers_get_exactly_the_versions_of_the_contract(demo: LayerGraph) -> None:
    plan, book = plan_for(demo), Notebook()
    exchanger = Exchanger(plan, 1, book)
    exchanger.begin_image()
    for step in range(3):
        run_step(exchanger, layers_of(plan))
        assert exchanger.gather("own") == ["own"]
        assert {version for _, version in book.read} == {max(0, step - 1)}
        book.read.clear()
    assert {bucket for _, version, bucket in book.sent if version == 0} == {None}


def test_local_layers_send_and_read_nothing(demo: LayerGraph) -> None:
    plan, book = plan_for(demo, "local"), Notebook()
    exchanger = Exchanger(plan, 0, book)
    exchanger.begin_step()
    exchanger.publish(layers_of(plan)[0], ["own"])
    assert exchanger.collect(layers_of(plan)[0]) is None
    assert book.sent == []


def test_a_layer_out_of_order_is_named_with_what_the_plan_has_next(demo: LayerGraph) -> None:
    plan = plan_for(demo)
    exchanger = Exchanger(plan, 2, Notebook())
    exchanger.begin_step()
    first, second = layers_of(plan)[:2]
    with pytest.raises(
        ScheduleMismatchError, match=f"rank 2, step 0: {second} ran where the plan has {first}"
    ):
        exchanger.publish(second, ["own"])


def test_a_layer_that_never_ran_is_named_at_the_end_of_the_step(demo: LayerGraph) -> None:
    plan = plan_for(demo)
    exchanger = Exchanger(plan, 0, Notebook())
    run_step(exchanger, layers_of(plan)[:-1])
    with pytest.raises(ScheduleMismatchError, match=f"{layers_of(plan)[-1]} is in the plan but did not run"):
        exchanger.gather("own")


def test_the_last_step_of_a_displaced_run_sends_nothing(demo: LayerGraph) -> None:
    plan, book = plan_for(demo, steps=3), Notebook()
    exchanger = Exchanger(plan, 0, book)
    for _ in range(3):
        run_step(exchanger, layers_of(plan))
    assert {version for _, version, _ in book.sent} == {0, 1}


def test_a_new_image_starts_at_step_zero(demo: LayerGraph) -> None:
    plan, book = plan_for(demo), Notebook()
    exchanger = Exchanger(plan, 0, book)
    run_step(exchanger, layers_of(plan))
    exchanger.begin_image()
    assert exchanger.begin_step() == 0
    assert book.images == 1


def test_a_layer_has_a_place_where_somebody_will_read_what_it_writes_there(demo: LayerGraph) -> None:
    plan = plan_for(demo, steps=3)
    exchanger = Exchanger(plan, 1, Notebook())
    exchanger.begin_image()
    for bucket in ("None", "0", None):
        step = exchanger.begin_step()
        layer = layers_of(plan)[0]
        assert exchanger.place(layer) == (bucket and f"{layer}, {step}, {bucket}")
        assert not exchanger.is_alone(layer)


def test_a_layer_that_sends_and_reads_nothing_is_alone(demo: LayerGraph) -> None:
    plan = plan_for(demo, "local")
    exchanger = Exchanger(plan, 1, Notebook())
    exchanger.begin_image()
    exchanger.begin_step()
    assert all(exchanger.is_alone(layer) and exchanger.place(layer) is None for layer in layers_of(plan))
