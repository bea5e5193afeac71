"""What a reader makes of late values: decoded from their payloads, and carried forward to this step if so asked.

`Reconstruction` stands between a rank's exchanger and its transport; every backend gets it. It keeps, for each
exchange, what the transport's bare values do not say: the running sums of residual codecs, on both sides, and the
versions before the last, for extrapolation (`distri.nn.extrapolation`).

Shape suffixes as in `distri.core.exchanger`: contexts are tokens first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from distri.core.codec import Codec, payload_bytes
from distri.core.exchanger import Transport
from distri.core.plan import Exchange, Plan
from distri.core.policy import ExchangeKind, Policy, Reach
from distri.core.staleness import EXTRAPOLATED_VERSIONS, version_from
from distri.core.traffic import part_shapes
from distri.nn.codec import channels_last, decode, encode, restore
from distri.nn.extrapolation import carry_forward, carry_moments_forward


class Reconstruction:
    """A transport that codes late values on their way out and rebuilds them on their way in."""

    def __init__(self, plan: Plan, rank: int, inner: Transport[Tensor]) -> None:
        self._plan = plan
        self._patch = plan.mesh.patch_of(rank)
        self._inner = inner
        self._sent: dict[str, list[Tensor]] = {}
        self._rebuilt: dict[str, dict[int, list[Tensor]]] = {}
        self._late_versions: dict[str, deque[int]] = {}
        self._far: dict[str, dict[int, Tensor]] = {}

    def begin_image(self) -> None:
        """Forget all running sums."""
        self._sent.clear()
        self._rebuilt.clear()
        self._late_versions.clear()
        self._far.clear()
        self._inner.begin_image()

    def place(self, exchange: Exchange, version: int, bucket: int | None) -> Tensor | None:
        """The transport's place, for values that are sent and read as they are."""
        if (
            exchange.codec is not Codec.NONE
            or exchange.steady is Policy.EXTRAPOLATED
            or exchange.reach is not None
        ):
            return None
        return self._inner.place(exchange, version, bucket)

    def send(self, exchange: Exchange, version: int, parts: Sequence[Tensor], bucket: int | None) -> None:
        """Send parts, coded if they travel late."""
        if bucket is not None:
            self._late_versions.setdefault(exchange.layer, deque(maxlen=2)).append(version)
        if exchange.codec is Codec.NONE:
            self._inner.send(exchange, version, parts, bucket)
        elif bucket is None:
            self._sent[exchange.layer] = [channels_last(part).float().clone() for part in parts]
            self._inner.send(exchange, version, parts, bucket)
        else:
            self._inner.send(exchange, version, self._encoded(exchange, parts), bucket)

    def _encoded(self, exchange: Exchange, parts: Sequence[Tensor]) -> list[Tensor]:
        codec = exchange.codec
        values = [channels_last(part).float() for part in parts]
        if not codec.is_residual:
            return [encode(codec, value_KV) for value_KV in values]
        payloads = []
        start = self._sent.setdefault(exchange.layer, [torch.zeros_like(value_KV) for value_KV in values])
        for known_KV, value_KV, part in zip(start, values, parts, strict=True):
            payload = encode(codec, value_KV - known_KV)
            # Rounded as the reader's sum is, or the two would drift apart with nobody to notice.
            known_KV.copy_((known_KV + decode(codec, payload, *value_KV.shape)).to(part.dtype))
            payloads.append(payload)
        return payloads

    def receive(self, exchange: Exchange, version: int, own: Sequence[Tensor]) -> Sequence[Tensor]:
        """The others' values as the layer is to use them."""
        extrapolated = exchange.steady is Policy.EXTRAPOLATED
        if exchange.reach is not None:
            return self._with_own(exchange, self._last_sent(exchange, exchange.reach, version, own), own)
        if exchange.codec is Codec.NONE and not extrapolated:
            return self._inner.receive(exchange, version, own)
        held = self._rebuilt.setdefault(exchange.layer, {})
        was_late = self._was_sent_late(exchange, version)
        is_late = version in held or was_late
        if version not in held:
            held[version] = self._rebuild(exchange, version, own, held.get(version - 1), was_late)
            for old in sorted(held)[: -EXTRAPOLATED_VERSIONS if extrapolated else -2]:
                del held[old]
        values, before, first = held[version], held.get(version - 1), held.get(version - 2)
        if extrapolated and is_late and before is not None and first is not None:
            carry = carry_moments_forward if exchange.kind is ExchangeKind.MOMENTS else carry_forward
            values = [carry(*parts) for parts in zip(values, before, first, strict=True)]
        return self._with_own(exchange, values, own)

    def _last_sent(
        self, exchange: Exchange, reach: Reach, version: int, own: Sequence[Tensor]
    ) -> list[Tensor]:
        """Every patch's share of a context of which far shares rest: those are kept here until they are sent again."""
        whole = self._inner.receive(exchange, version, own)[0]
        lengths = [shape[0] for shape in part_shapes(exchange, self._plan.partition.patches, self._patch)]
        shares = _shares(whole, lengths)
        kept = self._far.setdefault(exchange.layer, {})
        for patch, share in enumerate(shares):
            distance = abs(patch - self._patch)
            if distance <= reach.near:
                continue
            if version_from(reach, distance, version, self._plan.warmup_steps) == version:
                kept[patch] = share.clone()  # a backend may use its buffers again
            shares[patch] = kept[patch]
        return shares

    def _was_sent_late(self, exchange: Exchange, version: int) -> bool:
        """Whether all ranks sent this version behind computation: this one did, and they do alike."""
        return version in self._late_versions.get(exchange.layer, ())

    def gather(self, exchange: Exchange, version: int, own: Tensor) -> Sequence[Tensor]:
        """Outputs are never coded."""
        return self._inner.gather(exchange, version, own)

    def _rebuild(
        self,
        exchange: Exchange,
        version: int,
        own: Sequence[Tensor],
        known: Sequence[Tensor] | None,
        was_late: bool,
    ) -> list[Tensor]:
        """The others' values of one version: pieces in message order, or shares of the context in patch order."""
        is_coded = exchange.codec is not Codec.NONE and was_late
        sent = own if not is_coded else self._placeholder(exchange, own)
        arrived = list(self._inner.receive(exchange, version, sent))
        shapes = part_shapes(exchange, self._plan.partition.patches, self._patch)
        if exchange.kind is ExchangeKind.CONTEXT:
            arrived = _shares(arrived[0], self._wire_lengths(exchange, shapes, is_coded))
        if not is_coded:
            return [part.clone() for part in arrived]  # a backend may use its buffers again
        rebuilt = []
        for place, (payload, shape) in enumerate(zip(arrived, shapes, strict=True)):
            if exchange.kind is ExchangeKind.CONTEXT and place == self._patch:
                rebuilt.append(own[0])
                continue
            channels, count = channels_of(shape)
            values_KV = decode(exchange.codec, payload, channels, count)
            # Where warm-up read nothing, the sum starts from nothing at both ends.
            if exchange.codec.is_residual and known is not None:
                values_KV = values_KV + channels_last(known[place]).float()
            rebuilt.append(restore(values_KV, torch.Size(shape)).to(getattr(torch, exchange.dtype)))
        return rebuilt

    def _placeholder(self, exchange: Exchange, own: Sequence[Tensor]) -> Sequence[Tensor]:
        """What stands for this rank's own share among the payloads of a context; its value is never read."""
        if exchange.kind is not ExchangeKind.CONTEXT:
            return own
        channels, count = channels_of(tuple(own[0].shape))
        return [own[0].new_zeros(_payload_length(exchange, channels, count), dtype=torch.uint8)]

    def _wire_lengths(
        self, exchange: Exchange, shapes: Sequence[tuple[int, ...]], is_coded: bool
    ) -> list[int]:
        if not is_coded:
            return [shape[0] for shape in shapes]
        return [_payload_length(exchange, *channels_of(shape)) for shape in shapes]

    def _with_own(
        self, exchange: Exchange, values: Sequence[Tensor], own: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        if exchange.kind is not ExchangeKind.CONTEXT:
            return values
        return [torch.cat([own[0] if patch == self._patch else value for patch, value in enumerate(values)])]


def channels_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(channels, values a channel) of a part of this shape."""
    if len(shape) == 4:
        return shape[0] * shape[1], shape[2] * shape[3]
    return shape[1] * shape[2], shape[0]


def _payload_length(exchange: Exchange, channels: int, count: int) -> int:
    return payload_bytes(exchange.codec, channels * count, channels, 0)


def _shares(whole: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    return list(torch.split(whole, list(lengths)))
