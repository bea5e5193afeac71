"""A rank's exchanges between two steps, taken out and put back: what a checkpoint keeps of them.

After step s a rank holds what step s + 1 will read of the others: their versions s, for codecs the running sums, for
extrapolation the versions before, and far context that rests. `held` names all of it; `restore` puts it back into a
fresh rank, whose step s + 1 then reads the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from distri.core.codec import Codec
from distri.core.exchanger import Transport
from distri.core.plan import Exchange, Plan
from distri.core.policy import ExchangeKind, Policy
from distri.core.program import awaited_version
from distri.errors import RunError
from distri.nn.reconstruction import Reconstruction

VALUE, SENT, REBUILT, LATE, FAR = "value", "sent", "rebuilt", "late", "far"
SEPARATOR = "|"


class Resumable(Reconstruction):
    """A `Reconstruction` whose state between two steps can be taken out and put back."""

    def __init__(self, plan: Plan, rank: int, inner: Transport[Tensor]) -> None:
        super().__init__(plan, rank, inner)
        self._restored: dict[tuple[str, int], list[Tensor]] = {}
        self._own: dict[str, Sequence[Tensor]] = {}

    def begin_image(self) -> None:
        """Forget all versions."""
        self._restored.clear()
        self._own.clear()
        super().begin_image()

    def send(self, exchange: Exchange, version: int, parts: Sequence[Tensor], bucket: int | None) -> None:
        """Send, and remember what this rank's own value looks like."""
        self._own[exchange.layer] = parts
        super().send(exchange, version, parts, bucket)

    def receive(self, exchange: Exchange, version: int, own: Sequence[Tensor]) -> Sequence[Tensor]:
        """A restored version, or what the backend brings."""
        restored = self._restored.get((exchange.layer, version))
        if restored is None:
            return super().receive(exchange, version, own)
        if exchange.kind is not ExchangeKind.CONTEXT:
            return restored
        sizes = [patch.area for patch in self._plan.partition.at_level(exchange.level)]
        shares = torch.split(restored[0], sizes)
        return [torch.cat([own[0] if patch == self._patch else share for patch, share in enumerate(shares)])]

    def held(self, step: int) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything that `step` will read of the step before it; waits until it is there."""
        tensors: dict[str, Tensor] = {}
        for exchange, version in self._displaced(step):
            values = self._restored.get((exchange.layer, version))
            if values is None:
                values = list(self.receive(exchange, version, self._own[exchange.layer]))
            if not _is_rebuilt(exchange):
                _put(tensors, (VALUE, exchange.layer, version), values)
        for layer, values in self._sent.items():
            _put(tensors, (SENT, layer, 0), values)
        for layer, versions in self._rebuilt.items():
            for version, values in versions.items():
                _put(tensors, (REBUILT, layer, version), values)
        for layer, shares in self._far.items():
            for patch, share in shares.items():
                _put(tensors, (FAR, layer, patch), [share])
        for layer, late in self._late_versions.items():
            _put(tensors, (LATE, layer, 0), [torch.tensor(list(late))])
        return tensors

    def restore(self, step: int, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Put back what `held` returned for `step`.

        Raises:
            RunError: a name is none of those that `held` gives.
        """
        lists: dict[tuple[str, str, int], dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            parts = name.split(SEPARATOR)
            if len(parts) != 4 or not (parts[2] + parts[3]).isdecimal():
                raise RunError(f"a checkpoint of a rank holds {name!r}, which is no part of one")
            key = (parts[0], parts[1], int(parts[2]))
            with torch.inference_mode(
                False
            ):  # running sums are written to, in inference mode or outside of it
                lists.setdefault(key, {})[int(parts[3])] = tensor.to(device, copy=True)
        for (what, layer, version), found in lists.items():
            values = [found[place] for place in sorted(found)]
            if what == VALUE:
                self._restored[layer, version] = values
            elif what == SENT:
                self._sent[layer] = values
            elif what == REBUILT:
                self._rebuilt.setdefault(layer, {})[version] = values
            elif what == FAR:
                self._far.setdefault(layer, {})[version] = values[0]
            elif what == LATE:
                self._late_versions[layer] = deque(map(int, values[0].tolist()), maxlen=2)
            else:
                raise RunError(f"a checkpoint of a rank holds {what!r}, which is no part of one")
        for exchange, version in self._displaced(
            step
        ):  # a patch that receives no piece of a halo has an empty list
            if _is_rebuilt(exchange):
                self._rebuilt.setdefault(exchange.layer, {}).setdefault(version, [])
            else:
                self._restored.setdefault((exchange.layer, version), [])

    def _displaced(self, step: int) -> Iterator[tuple[Exchange, int]]:
        """Every exchange that reads an earlier version at `step`, and which."""
        for exchange in self._plan.exchanges:
            if exchange.kind is not ExchangeKind.OUTPUT:
                version = awaited_version(self._plan, exchange, step)
                if version is not None and version != step:
                    yield exchange, version


def _is_rebuilt(exchange: Exchange) -> bool:
    """Whether `Reconstruction` keeps the versions itself."""
    return exchange.codec is not Codec.NONE or exchange.steady is Policy.EXTRAPOLATED


def _put(tensors: dict[str, Tensor], key: tuple[str, str, int], values: Sequence[Tensor]) -> None:
    for place, value in enumerate(values):
        name = SEPARATOR.join(map(str, (*key, place)))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
