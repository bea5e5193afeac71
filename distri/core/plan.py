"""The plan: everything that a backend is given, as plain frozen values.

A plan names every exchange of every layer: what it carries, how it is served in each phase, between which patches, in
how many bytes, and in which bucket it travels. Derived figures are stored, so that whoever reads the file sees them,
and `distri.core.verify` recomputes each of them, so that nobody can change one alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from distri.core.codec import Codec
from distri.core.mesh import Mesh
from distri.core.ops.conv2d import ConvGeometry
from distri.core.partition import Grain, Partition
from distri.core.policy import ExchangeKind, Phase, Policy, PolicyTable, Reach
from distri.core.refresh import RefreshRule
from distri.core.shape import Extent, Rect, full_rect

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class ModelReference:
    """Which denoiser the plan is for: a preset's name or a directory, and the fingerprint of its layer graph."""

    name: str
    fingerprint: str
    latent_channels: int
    vae_factor: int
    alignment: int
    alignment_layer: str

    @property
    def grain(self) -> Grain:
        """What borders of patches must be multiples of."""
        return Grain(self.alignment, self.alignment_layer, self.vae_factor)


@dataclass(frozen=True)
class ImageRequest:
    """What is to be drawn: pixels, denoising steps, and whether guidance doubles the batch."""

    height: int
    width: int
    num_inference_steps: int
    guidance: bool = True
    num_images: int = 1

    @property
    def batch(self) -> int:
        """Latents in one forward pass of the unsplit model."""
        return self.num_images * (2 if self.guidance else 1)


@dataclass(frozen=True)
class Exchange:
    """One layer's exchange. Tuples with one entry a patch are in patch order and equal on both guidance branches.

    shape: the whole picture's value at one rank of the guidance mesh: (batch, channels, rows, columns) for `halo` and
    `output`, (batch, groups, 3) for `moments`, (tokens, batch, keys and values) for `context`. level: how far that is
    downsampled. codec: how late values are written. reach: which context
    rests. bucket: the message it travels in once the phase is steady; None
    if it travels alone or not at all.
    """

    index: int
    layer: str
    kind: ExchangeKind
    warmup: Policy
    steady: Policy
    codec: Codec
    reach: Reach | None
    dtype: str
    shape: tuple[int, ...]
    level: int
    geometry: ConvGeometry | None
    peers: tuple[tuple[int, ...], ...]
    elements_received: tuple[int, ...]
    bytes_received: tuple[int, ...]
    bucket: int | None

    @property
    def stays_on_patch(self) -> bool:
        """Whether it is an output that reaches the guidance partner of its patch only (`distri.core.latent`)."""
        return self.kind is ExchangeKind.OUTPUT and self.steady is Policy.LOCAL

    def policy(self, phase: Phase) -> Policy:
        """How it is served in a phase."""
        return self.warmup if phase is Phase.WARMUP else self.steady


@dataclass(frozen=True)
class Plan:
    """One run, for any backend. `hash` covers every other field.

    latent_layers: the convolutions that read the latent itself, where every rank has it whole. pattern: `neighbours`,
    as distri runs it, or `gather_all`, as the reference implementation does (halos and moments gathered by every rank).
    """

    schema_version: int
    model: ModelReference
    image: ImageRequest
    dtype: str
    mesh: Mesh
    partition: Partition
    warmup_steps: int
    refresh: RefreshRule | None
    policy: PolicyTable
    pattern: str
    latent_layers: tuple[str, ...]
    exchanges: tuple[Exchange, ...]
    macs_per_device: tuple[int, ...]
    elements_received_per_step: tuple[int, ...]
    bytes_received_per_step: tuple[int, ...]
    hash: str = ""

    @property
    def latent(self) -> Rect:
        """The whole latent."""
        factor = self.model.vae_factor
        return full_rect(self.image.height // factor, self.image.width // factor)

    @property
    def batch_per_rank(self) -> int:
        """Latents in one forward pass of one rank."""
        return self.image.batch // self.mesh.cfg

    @property
    def is_attached(self) -> bool:
        """Whether any layer exchanges anything, so that the parallel layers are needed at all."""
        return any(
            exchange.policy(phase) is not Policy.LOCAL
            for exchange in self.exchanges
            if exchange.kind is not ExchangeKind.OUTPUT
            for phase in Phase
        )

    @property
    def keeps_latent_on_patch(self) -> bool:
        """Whether each rank has only its patch of the latent between steps (`distri.core.latent`)."""
        return self.policy.policy(ExchangeKind.OUTPUT, Phase.STEADY, "output") is Policy.LOCAL

    @property
    def turns(self) -> tuple[Plan, ...]:
        """This plan as it is at step 0, 1, ... if each step's patches stayed: one, or two whose steps take turns."""
        partition = self.partition
        if not partition.turned:
            return (self,)
        fixed = (Partition(partition.axis, patches) for patches in partition.turns)
        return tuple(dataclasses.replace(self, partition=partition) for partition in fixed)

    def extent(self, patch: int, text: int = 77, step: int = 0) -> Extent:
        """What one rank's forward pass sees."""
        return Extent(self.batch_per_rank, text, self.partition.at_step(step)[patch])

    @property
    def by_layer(self) -> dict[str, Exchange]:
        """Exchanges by layer."""
        return {exchange.layer: exchange for exchange in self.exchanges}

    @property
    def num_buckets(self) -> int:
        """Number of messages per step, peer and direction that the steady phase sends."""
        return 1 + max((e.bucket for e in self.exchanges if e.bucket is not None), default=-1)


DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8": 1}
