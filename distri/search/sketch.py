"""Plans without their derived figures, made fast: what the simulator's tiers need of a candidate, and no more.

The exchanges of a model do not depend on how its picture is cut (their shapes are the whole picture's), so they are
listed once for each number of guidance branches and filled with policies and buckets. A test holds that a sketch and
the full plan of the same candidate lower to the same tasks; the chosen plan itself always comes from `make_plan`.
"""

from __future__ import annotations

import dataclasses

from distri.core.graph import LayerGraph
from distri.core.partition import make_partition
from distri.core.plan import SCHEMA_VERSION, Exchange, ImageRequest, Plan
from distri.core.planner import (
    PlanRequest,
    choose_mesh,
    latent_layers,
    list_exchanges,
    make_plan,
    reception,
    reference_of,
)
from distri.core.policy import READS_LATE, ExchangeKind, Phase, PolicyTable, policy_table
from distri.search.space import Layout, Serving, Tables, plan_request


class Sketcher:
    """Makes the sketches of one picture by one model."""

    def __init__(self, graph: LayerGraph, image: ImageRequest, dtype: str) -> None:
        self.graph = graph
        self.image = image
        self.dtype = dtype
        self.tables = Tables(graph)
        self.model = reference_of(graph)
        self._latent_layers = latent_layers(graph)
        self._bare: dict[tuple[int, bool], tuple[Exchange, ...]] = {}
        self._served: dict[object, tuple[Exchange, ...]] = {}

    def request(self, layout: Layout, serving: Serving) -> PlanRequest:
        """The request for the full plan of a candidate."""
        return plan_request(layout, serving, self.image, self.dtype, self.tables)

    def plan(self, layout: Layout, serving: Serving) -> Plan:
        """The full plan of a candidate, sealed with its hash."""
        return make_plan(self.request(layout, serving), self.graph)

    def sketch(self, layout: Layout, serving: Serving) -> Plan:
        """A candidate's plan without peers, bytes, MACs and hash."""
        request = self.request(layout, serving)
        draft = self._draft(request)
        key = (layout.cfg, layout.patches > 1, request.policy.rules, serving.layers_per_bucket)
        if key not in self._served:
            bare = self._exchanges(layout.cfg, layout.patches > 1)
            self._served[key] = _served(bare, request.policy, serving.layers_per_bucket)
        return dataclasses.replace(draft, exchanges=self._served[key])

    def with_bytes(self, sketch: Plan) -> Plan:
        """A sketch whose exchanges know what each patch receives, for the memory model."""
        known: dict[object, tuple[tuple[tuple[int, ...], ...], tuple[int, ...], tuple[int, ...]]] = {}
        filled = []
        for exchange in sketch.exchanges:
            key = (
                exchange.kind,
                exchange.shape,
                exchange.level,
                exchange.geometry,
                exchange.codec,
                exchange.reach,
            )
            if key not in known:
                known[key] = reception(sketch, exchange)
            peers, elements, sizes = known[key]
            filled.append(
                dataclasses.replace(exchange, peers=peers, elements_received=elements, bytes_received=sizes)
            )
        return dataclasses.replace(sketch, exchanges=tuple(filled))

    def _draft(self, request: PlanRequest) -> Plan:
        mesh = choose_mesh(request)
        factor = self.model.vae_factor
        partition = make_partition(
            request.image.height // factor, request.image.width // factor, mesh.patch, request.axis,
            self.model.grain, request.weights, request.grid,
        )  # fmt: skip
        return Plan(
            SCHEMA_VERSION, self.model, request.image, request.dtype, mesh, partition,
            min(request.warmup_steps, request.image.num_inference_steps), request.refresh, request.policy,
            request.pattern, self._latent_layers, (), (), (), (),
        )  # fmt: skip

    def _exchanges(self, cfg: int, has_patches: bool) -> tuple[Exchange, ...]:
        key = (cfg, has_patches)
        if key not in self._bare:
            request = PlanRequest(
                self.image, cfg * (2 if has_patches else 1), cfg == 2, policy_table("corrected"), 1,
                dtype=self.dtype,
            )  # fmt: skip
            draft = self._draft_of_any_size(request)
            self._bare[key] = list_exchanges(draft, self.graph)
        return self._bare[key]

    def _draft_of_any_size(self, request: PlanRequest) -> Plan:
        """A draft of two patches, or of one where the picture has only one row of units: shapes do not differ."""
        rows, cols = request.image.height, request.image.width
        if min(rows, cols) and rows // self.model.vae_factor <= self.model.alignment:
            request = dataclasses.replace(request, axis=type(request.axis).COLS)
        return self._draft(request)


def _served(bare: tuple[Exchange, ...], table: PolicyTable, layers_per_bucket: int) -> tuple[Exchange, ...]:
    """Exchanges with their policies, codecs and buckets; buckets as `make_plan` fills them."""
    late = 0
    found = []
    for exchange in bare:
        warmup = table.policy(exchange.kind, Phase.WARMUP, exchange.layer)
        rule = table.rule(exchange.kind, Phase.STEADY, exchange.layer)
        bucket = None
        if rule.policy in READS_LATE:
            bucket, late = late // layers_per_bucket, late + 1
        found.append(
            dataclasses.replace(
                exchange,
                warmup=warmup,
                steady=rule.policy,
                codec=rule.codec,
                reach=rule.reach,
                bucket=bucket,
                peers=(),
                elements_received=(),
                bytes_received=(),
            )
        )
    return tuple(found)


def is_output(exchange: Exchange) -> bool:
    """Whether it is the gather at the end of a step."""
    return exchange.kind is ExchangeKind.OUTPUT
