"""What is compared: ways of drawing one and the same picture, each a name, a plan, and a number of threads."""

from __future__ import annotations

from dataclasses import dataclass

from distri.core.graph import LayerGraph
from distri.core.latent import LatentPlace
from distri.core.partition import SplitAxis
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import LAYERS_PER_BUCKET, PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.errors import UserError

SINGLE, SINGLE_ALL_CORES = "single", "single, all cores"
GATHER_ALL = "gather_all"
CFG_SPLIT = "cfg_split"
ON_PATCH = "latent_on_patch"
WARMUP = 2
DEFAULT_MODES = ("corrected", "stale", "fresh", "local", GATHER_ALL, CFG_SPLIT)


@dataclass(frozen=True)
class BenchRequest:
    """One comparison. rounds: how often everything is measured in turn. steps: measured steps of each in a round."""

    model: str
    height: int
    width: int
    ranks: int
    modes: tuple[str, ...] = DEFAULT_MODES
    rounds: int = 7
    steps: int = 3
    dtype: str = "float32"
    split: SplitAxis = SplitAxis.ROWS
    layers_per_bucket: int = LAYERS_PER_BUCKET
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if self.ranks < 2:
            raise UserError(f"a comparison needs 2 ranks or more, not {self.ranks}")


@dataclass(frozen=True)
class Variant:
    """One way. plan: None for the unmodified model, which rank 0 runs alone. uses_all_cores: on as many threads."""

    name: str
    plan: Plan | None
    gathers_all: bool = False
    uses_all_cores: bool = False


def variants_of(request: BenchRequest, graph: LayerGraph) -> tuple[Variant, ...]:
    """Everything that a request compares, the single device first.

    Raises:
        UserError: a mode is unknown, or the image does not split so.
    """
    singles = (Variant(SINGLE, None), Variant(SINGLE_ALL_CORES, None, uses_all_cores=True))
    return (*singles, *(_variant(request, graph, mode) for mode in request.modes))


def _variant(request: BenchRequest, graph: LayerGraph, mode: str) -> Variant:
    policy = {GATHER_ALL: "stale", CFG_SPLIT: "corrected", ON_PATCH: "corrected"}.get(mode, mode)
    # One step to let messages queue as they do in a run, then the measured ones, in every round; none is the last one.
    steps = WARMUP + request.rounds * (request.steps + 1) + 1
    plan = make_plan(
        PlanRequest(
            ImageRequest(request.height, request.width, steps),
            request.ranks,
            cfg_split=mode == CFG_SPLIT,
            policy=policy_table(policy),
            warmup_steps=WARMUP,
            axis=request.split,
            dtype=request.dtype,
            layers_per_bucket=request.layers_per_bucket,
            pattern="gather_all" if mode == GATHER_ALL else "neighbours",
            latent=LatentPlace.PATCH if mode == ON_PATCH else LatentPlace.WHOLE,
        ),
        graph,
    )
    return Variant(mode, plan, gathers_all=mode == GATHER_ALL)
