"""CUDA graphs on a processor: a tape takes down every operation and message of a step and does them again, in the same
memory, without the code that gave rise to them. As strict as CUDA: what was not recorded cannot be waited for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from distri.backends.torch_distributed import TorchBackend
from distri.backends.torch_distributed.lane import Lane, Ticket
from distri.backends.torch_distributed.recorder import TransportRecorder
from distri.backends.torch_distributed.transport import TorchTransport


class Deck:
    """The tape that runs, if one does, and all tapes so far."""

    def __init__(self) -> None:
        self.current: Tape | None = None
        self.tapes: list[Tape] = []

    def new_tape(self) -> Tape:
        self.tapes.append(Tape(self))
        return self.tapes[-1]


class Tape(TorchDispatchMode):
    """Implements `DeviceGraph`. Unlike CUDA it does what it takes down; so the first replay has nothing to do."""

    def __init__(self, deck: Deck) -> None:
        super().__init__()
        self._deck = deck
        self._events: list[Callable[[], None]] = []
        self._tickets: dict[int, Ticket] = {}
        self.num_replays = 0

    def capture(self, work: Callable[[], Any]) -> Any:
        self._deck.current = self
        try:
            with self:
                return work()
        finally:
            self._deck.current = None

    def replay(self) -> None:
        if self.num_replays:
            for event in self._events:
                event()
        self.num_replays += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a recorded step waits for the device"
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        outputs = _tensors(made)
        own = [i for i, out in enumerate(outputs) if out.untyped_storage().data_ptr() not in inputs]

        def again() -> None:
            repeated = _tensors(func(*args, **kwargs))
            for place in own:
                outputs[place].copy_(repeated[place])

        self._events.append(again)
        return made

    def submit(self, lane: Lane, work: Callable[[], None]) -> int:
        number = len(self._events)
        self._events.append(lambda: self._tickets.__setitem__(number, lane.submit(work)))
        return number

    def wait(self, number: int) -> None:
        self._events.append(lambda: self._tickets[number].wait())

    def join(self, lane: Lane) -> None:
        self._events.append(lane.join)


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(nested)[0] if isinstance(leaf, Tensor)]


class TapeTicket:
    """A ticket that the tape knows, if it was given on it."""

    def __init__(self, inner: Ticket, deck: Deck) -> None:
        self.inner = inner
        self.place: tuple[Tape, int] | None = None
        self._deck = deck

    @property
    def is_done(self) -> bool:
        return self._deck.current is None and self.inner.is_done

    def wait(self) -> None:
        tape = self._deck.current
        if tape is not None:
            assert self.place is not None, "a recording waits for what was given before it"
            assert self.place[0] is tape, "a recording waits for what is on another"
            tape.wait(self.place[1])
        self.inner.wait()


class TapeLane:
    """A lane whose work is done, and taken down while a tape runs."""

    def __init__(self, inner: Lane, deck: Deck) -> None:
        self._inner = inner
        self._deck = deck

    def promise(self) -> TapeTicket:
        return TapeTicket(self._inner.promise(), self._deck)

    def submit(self, work: Callable[[], None], ticket: Ticket | None = None) -> TapeTicket:
        given = ticket if ticket is not None else self.promise()
        assert isinstance(given, TapeTicket)
        self._inner.submit(work, given.inner)
        if self._deck.current is not None:
            given.place = self._deck.current, self._deck.current.submit(self._inner, work)
        return given

    def join(self) -> None:
        self._inner.join()
        if self._deck.current is not None:
            self._deck.current.join(self._inner)

    def close(self) -> None:
        self._inner.close()


class TapeBackend(TorchBackend):
    """gloo, with tapes where a GPU has CUDA graphs."""

    def _open_transport(self, dtype: Any) -> TorchTransport:
        self.deck = Deck()
        transport = super()._open_transport(dtype)
        late, urgent = (TapeLane(lane, self.deck) for lane in (self._links.late, self._links.urgent))
        self._links = transport._links = dataclasses.replace(self._links, late=late, urgent=urgent)
        return transport

    def recorder(self) -> TransportRecorder:
        return TransportRecorder(self._transport, self.deck.new_tape, self.all_agree)


class FullTape(Tape):
    """A tape that turns out to be full when the step is over."""

    def capture(self, work: Callable[[], Any]) -> Any:
        super().capture(work)
        raise RuntimeError("this device records nothing")


class RefusingBackend(TapeBackend):
    """gloo, where rank 0's device turns out not to record."""

    def recorder(self) -> TransportRecorder:
        new_tape = (lambda: FullTape(self.deck)) if self.rank == 0 else self.deck.new_tape
        return TransportRecorder(self._transport, new_tape, self.all_agree)
