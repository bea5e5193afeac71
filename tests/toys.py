"""Small denoisers whose every layer can be chosen, and plans for them: what the tests of layers and backends run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from distri.backends.in_process import InProcessBackend
from distri.core.graph import LayerGraph
from distri.core.partition import SplitAxis
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import PolicyTable, policy_table
from distri.models.capture import Probe, capture
from distri.session import Session


@dataclass(frozen=True)
class ToyShape:
    """The choices of a toy denoiser."""

    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: int = 1
    channels: int = 8
    groups: int = 2
    attention: bool = True


class ToyDenoiser(nn.Module):
    """Convolution, GroupNorm, a convolution of any kernel, self- and cross-attention, resampling, convolution."""

    def __init__(self, shape: ToyShape) -> None:
        super().__init__()
        channels = shape.channels
        padding = tuple(shape.dilation * (k - 1) // 2 for k in shape.kernel)
        self.shape = shape
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.norm = nn.GroupNorm(shape.groups, channels)
        self.mid = nn.Conv2d(channels, channels, shape.kernel, shape.stride, padding, shape.dilation)
        if shape.attention:
            self.attend = Attention(channels, heads=2, dim_head=channels // 2)
            self.read = Attention(channels, cross_attention_dim=6, heads=2, dim_head=channels // 2)
        self.conv_out = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, added: Tensor | None = None
    ) -> tuple[Tensor]:
        """Whole or patch, as it comes."""
        x = F.silu(self.norm(self.conv_in(sample)))
        x = self.mid(x)
        if self.shape.attention:
            x = x + self.attend(x)
            x = x + self.read(x, encoder_hidden_states)
        if self.shape.stride > 1:
            x = F.interpolate(x, scale_factor=float(self.shape.stride), mode="nearest")
        return (self.conv_out(x),)


def toy_arguments(probe: Probe) -> dict[str, Any]:
    """What a capture pass calls a toy with."""
    return {
        "sample": torch.zeros(probe.batch, 4, probe.rows, probe.cols),
        "timestep": torch.zeros(probe.batch),
        "encoder_hidden_states": torch.zeros(probe.batch, probe.text, 6),
    }


def toy(shape: ToyShape | None = None, seed: int = 0) -> tuple[ToyDenoiser, LayerGraph]:
    """A toy with seeded weights, and its graph."""
    chosen = shape or ToyShape()
    torch.manual_seed(seed)
    model = ToyDenoiser(chosen).eval()
    with torch.device("meta"):
        hollow = ToyDenoiser(chosen)
    probe = Probe(factor=chosen.stride)
    graph = capture("toy", hollow, toy_arguments, latent_channels=4, text_width=6, probe=probe)
    return model, graph


def toy_plan(
    graph: LayerGraph,
    num_ranks: int,
    *,
    rows: int = 16,
    cols: int = 12,
    steps: int = 4,
    policy: str | PolicyTable = "corrected",
    axis: SplitAxis = SplitAxis.ROWS,
    weights: tuple[Fraction, ...] | None = None,
    cfg_split: bool = False,
    warmup_steps: int = 1,
    **more: Any,
) -> Plan:
    """A plan for a toy; sizes in latent rows and columns."""
    table = policy if isinstance(policy, PolicyTable) else policy_table(policy)
    image = ImageRequest(rows * 8, cols * 8, steps)
    return make_plan(
        PlanRequest(image, num_ranks, cfg_split, table, warmup_steps, axis, weights, dtype="float32", **more),
        graph,
    )


def inputs_of(plan: Plan, step: int, seed: int = 0) -> dict[str, Any]:
    """The arguments of one step, whole."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    rows, cols = plan.latent.rows.size, plan.latent.cols.size
    text = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(plan.image.batch, 4, rows, cols, generator=generator),
        "timestep": torch.tensor(1000.0 - step),
        "encoder_hidden_states": torch.randn(plan.image.batch, 5, 6, generator=text),
    }


Inputs = Callable[[Plan, int], dict[str, Any]]


@torch.no_grad()
def run_in_process(model: nn.Module, plan: Plan, inputs: Inputs = inputs_of) -> list[Tensor]:
    """The denoiser's output at each step of a plan."""
    with Session(model, InProcessBackend(plan, timeout_s=20.0)) as session:
        session.begin_image()
        return [model(**inputs(plan, step))[0] for step in range(plan.image.num_inference_steps)]


@torch.no_grad()
def run_single(model: nn.Module, plan: Plan, inputs: Inputs = inputs_of) -> list[Tensor]:
    """The unmodified model's output at each step."""
    return [model(**inputs(plan, step))[0] for step in range(plan.image.num_inference_steps)]
