"""Starts and ends one rank of a run under torch.distributed.

Everything that all ranks need in common is checked at the rendezvous, before any model runs: their number, the plan,
and the versions of distri and torch.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

import distri
from distri.backends.base import Recorder, Span
from distri.backends.torch_distributed.advice import advice_on_links
from distri.backends.torch_distributed.agreement import check_identities, decode, describe_tensors, encode
from distri.backends.torch_distributed.alarm import Alarm, LostPeerError, StoreWatch, first_line
from distri.backends.torch_distributed.giving_way import giving_way
from distri.backends.torch_distributed.lane import Lane, open_lane
from distri.backends.torch_distributed.recorder import CudaGraphs, TransportRecorder
from distri.backends.torch_distributed.transport import Links, TorchTransport, no_span
from distri.backends.torch_distributed.wire import LinkError, Wire, plainly
from distri.core.plan import Plan
from distri.errors import RunError, UserError

CLOSE_LIMIT_S = 5.0
HEAD_BYTES = 4096


class TorchBackend:
    """One rank of a run: implements `distri.backends.base.Backend`.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them. device: default is the GPU
    of this local rank if there are GPUs, else the CPU. timeout_s: how long a rank waits for another. dtype: of the
    activations; default is that of the first that is exchanged.

    Raises:
        UserError: the plan is for another number of ranks, or for more GPUs than there are.
        RunError: ranks are missing or do not agree.
    """

    name = "torch"

    def __init__(
        self,
        plan: Plan,
        *,
        device: torch.device | str | None = None,
        timeout_s: float = 60.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.plan = plan
        self.rank, size = _place_in_world(plan)
        self.local_ranks: tuple[int, ...] = (self.rank,)
        self.device = choose_device(device)
        self.timeout_s = timeout_s
        self.who = name_of(self.rank)
        self._is_closed = False
        self._num_collected = 0
        self._num_votes = 0
        self._failed = False
        self._owns_group = not dist.is_initialized()
        self._store = self._rendezvous(size)
        self._alarm = Alarm()
        self._lanes: list[Lane] = []
        self._groups: list[dist.ProcessGroup] = []
        self._watch = StoreWatch(self._store, self._alarm)
        self._transport = self._open_transport(dtype)
        if self.rank == 0 and self.device.type == "cuda":
            for sentence in advice_on_links():
                warnings.warn(sentence, RuntimeWarning, stacklevel=2)

    def for_plan(self, plan: Plan) -> TorchBackend:
        """This rank in another plan, with lanes and process groups of its own."""
        return TorchBackend(plan, device=self.device, timeout_s=self.timeout_s)

    def transport(self, rank: int) -> TorchTransport:
        """The transport of this process's rank."""
        assert rank == self.rank, f"rank {rank} lives in another process"
        return self._transport

    def broadcast(self, value: Any) -> Any:
        """Rank 0's nested tensors, on every rank and on its device.

        Raises:
            RunError: a leaf is neither a tensor nor plain; all ranks say so.
            LostPeerError: a rank is gone.
        """
        text = ""
        tensors: list[Tensor] = []
        if self.rank == 0:
            try:
                text, tensors = encode(value)
            except RunError as error:
                text = f"!{error}"
        text = self._text_from_rank_0(text)
        if text.startswith("!"):
            raise RunError(text[1:])
        with torch.inference_mode(False):  # the lane writes them outside of inference mode
            if self.rank != 0:
                tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in describe_tensors(text)]
            received = [tensor.detach().to(self.device).contiguous() for tensor in tensors]
            for tensor in received:
                if tensor.numel():
                    self._from_rank_0(tensor.view(-1).view(torch.uint8))
        return decode(text, received)

    def broadcast_like(self, tensor: Any) -> Tensor:
        """Rank 0's tensor, where every rank has one of its shape and dtype.

        Raises:
            LostPeerError: a rank is gone.
        """
        with torch.inference_mode(False):  # as above
            received = torch.empty_like(tensor, device=self.device, memory_format=torch.contiguous_format)
            if self.rank == 0:
                received.copy_(tensor)
            self._from_rank_0(received.view(-1).view(torch.uint8))
        return received

    def recorder(self) -> Recorder | None:
        """CUDA graphs; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return TransportRecorder(self._transport, CudaGraphs(), self.all_agree)

    def all_agree(self, says_yes: bool) -> bool:
        """Whether every rank says yes; all ranks ask.

        Raises:
            LostPeerError: another rank failed, or did not say anything in time.
        """
        self._num_votes += 1
        name = f"vote {self._num_votes}"
        self._store.add(f"{name}: no", 0 if says_yes else 1)
        if not self._have_all_come(name, self.timeout_s):
            cause = self._alarm.sentence or f"not every rank came to an agreement within {self.timeout_s:g} s"
            raise LostPeerError(cause)
        return self._store.add(f"{name}: no", 0) == 0

    @contextmanager
    def traced(self, span: Span) -> Iterator[None]:
        """While it lasts, waits and messages happen in spans."""
        self._transport.span = span
        try:
            yield
        finally:
            self._transport.span = no_span

    def collect(self, text: str) -> list[str] | None:
        """Every rank's text on rank 0, through the store of the rendezvous.

        Raises:
            RunError: a rank's did not come in time.
        """
        self._num_collected += 1
        name = f"collected/{self._num_collected}"
        if self.rank != 0:
            self._store.set(f"{name}/{self.rank}", text)
            return None
        try:
            others = range(1, self.plan.mesh.size)
            return [text, *(self._store.get(f"{name}/{rank}").decode() for rank in others)]
        except dist.DistError as error:
            raise RunError(f"not every rank's report came: {first_line(error)}") from error

    def abort(self, reason: BaseException) -> None:
        """Tell every rank that this one failed, and where."""
        self._failed = True
        if not isinstance(reason, LostPeerError):
            self._watch.tell(self.describe(reason))

    def describe(self, reason: BaseException) -> str:
        """One sentence about a failure of this rank: rank, host, process, step, layer and cause."""
        cause = first_line(reason)
        if cause.startswith("rank "):
            return cause
        kind = "" if isinstance(reason, RunError | UserError) else f"{type(reason).__name__}: "
        return f"{self.who}: {self._transport.position}: {kind}{cause}"

    def close(self) -> None:
        """End lanes, watch and process groups; a rank that did not fail lets the others finish first."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._transport.is_within_step and not self._failed:
            self.abort(RunError("stopped in the middle of a step"))
        if not self._failed and self._alarm.sentence is None:
            self._part()
        elif self._failed and self.rank == 0:
            self._watch.linger()
        for lane in self._lanes:
            lane.close()
        self._watch.close()
        if self._owns_group and not self._failed and self._alarm.sentence is None:
            dist.destroy_process_group()

    def _rendezvous(self, size: int) -> Store:
        """Meet the other ranks and compare identities; returns the store of this run.

        Raises:
            LostPeerError: a rank did not come, or the store that all met in is gone.
            RunError: a rank is of another run.
        """
        timeout = timedelta(seconds=self.timeout_s)
        try:
            store = _open_store(self.rank, size, timeout)
            run = (store.add("distri/runs", 1) - 1) // size
            store = PrefixStore(f"distri/{run}", store)
            check_identities(store, self.rank, size, self._identity())
            if self._owns_group:
                with giving_way():
                    dist.init_process_group(
                        "nccl" if self.device.type == "cuda" else "gloo",
                        store=PrefixStore("world", store),
                        rank=self.rank,
                        world_size=size,
                        timeout=timeout,
                        device_id=self.device if self.device.type == "cuda" else None,
                    )
        except RuntimeError as error:
            has_met = not self._owns_group  # they did before, so this one lost what they met in
            what = (
                "the rendezvous store is gone"
                if has_met and isinstance(error, dist.DistNetworkError)
                else f"not all {size} ranks met within {self.timeout_s:g} s"
            )
            raise LostPeerError(f"{self.who}: {what}: {first_line(error)}") from error
        except ValueError as error:
            raise RunError(f"{self.who}: cannot meet the others: {first_line(error)}") from error
        return store

    def _identity(self) -> dict[str, str]:
        return {
            "who": self.who,
            "plan": self.plan.hash[:16],
            "version of distri": distri.__version__,
            "version of torch": str(torch.__version__),
            "kind of device": self.device.type,
        }

    def _open_transport(self, dtype: torch.dtype | None) -> TorchTransport:
        mesh = self.plan.mesh
        late = self._branch_wire()
        with giving_way():
            urgent = self._branch_wire()
        links = Links(
            late=open_lane("distri-late", self.device, self._alarm),
            urgent=open_lane("distri-urgent", self.device, self._alarm),
            late_wire=late,
            urgent_wire=urgent,
            world_wire=self._wire(dist.group.WORLD, tuple(range(mesh.size))),
            alarm=self._alarm,
            timeout_s=self.timeout_s,
        )
        self._links = links
        self._lanes += [links.late, links.urgent]
        return TorchTransport(self.plan, self.rank, links, self.device, self.who, dtype)

    def _branch_wire(self) -> Wire:
        """A process group for this rank's guidance branch; every rank takes part in making those of all branches."""
        mesh = self.plan.mesh
        mine: Wire | None = None
        for branch in range(mesh.cfg):
            ranks = mesh.peers(mesh.rank_of(branch, 0))
            group = dist.new_group(list(ranks), timeout=timedelta(seconds=self.timeout_s))
            if branch == mesh.branch_of(self.rank):
                mine = self._wire(group, ranks)
        assert mine is not None
        return mine

    def _wire(self, group: dist.ProcessGroup | None, ranks: tuple[int, ...]) -> Wire:
        assert group is not None
        is_nccl = self.device.type == "cuda"
        if (
            is_nccl
        ):  # it connects a group in its first call, which all of its ranks must make; messages are for some
            dist.all_reduce(torch.zeros(1, device=self.device), group=group)
        return Wire(group, ranks, self.timeout_s, is_batched=is_nccl)

    def _text_from_rank_0(self, text: str) -> str:
        """Rank 0's text: its length and its beginning in one message, the rest, if any, in a second."""
        raw = text.encode()
        head = (len(raw).to_bytes(8, "little") + raw)[:HEAD_BYTES].ljust(HEAD_BYTES, b"\0")
        head = self._bytes_from_rank_0(head)
        length = int.from_bytes(head[:8], "little")
        room = HEAD_BYTES - 8
        if length <= room:
            return head[8 : 8 + length].decode()
        rest = raw[room:] if self.rank == 0 else bytes(length - room)
        return (head[8:] + self._bytes_from_rank_0(rest)).decode()

    def _bytes_from_rank_0(self, raw: bytes) -> bytes:
        with torch.inference_mode(False):
            buffer = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(self.device)
        return self._from_rank_0(buffer).cpu().numpy().tobytes()

    def _from_rank_0(self, tensor: Tensor) -> Tensor:
        """Fill `tensor` with rank 0's, on the urgent lane and so in order with everything else."""
        ticket = self._links.urgent.submit(lambda: _broadcast(tensor, self.timeout_s))
        self._transport.await_ticket(ticket, "the broadcast from rank 0", "broadcast")
        return tensor

    def _part(self) -> None:
        """Wait, for a short while, until every rank has come this far: nobody loses a link that it still needs."""
        with suppress(RuntimeError):  # the store is gone, and so is whoever kept it
            self._have_all_come("parted", min(CLOSE_LIMIT_S, self.timeout_s))

    def _have_all_come(self, place: str, limit_s: float) -> bool:
        """Whether every rank comes to this place of its program in time, before any alarm."""
        if self._store.add(place, 1) == self.plan.mesh.size:
            self._store.set(f"all {place}", "1")
        return self._watch.wait_for(f"all {place}", limit_s)


def _broadcast(tensor: Tensor, timeout_s: float) -> None:
    try:
        dist.broadcast(tensor, src=0)
    except RuntimeError as error:  # a tree of messages, of which this rank does not know whose failed
        raise LinkError(f"lost a rank: {plainly(error, timeout_s)}") from error


def _place_in_world(plan: Plan) -> tuple[int, int]:
    """Rank and number of ranks, from the environment that the launcher set."""
    missing = [x for x in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if x not in os.environ]
    if missing and not dist.is_initialized():
        raise UserError(
            f"the torch backend is started by 'distri run' or by torchrun, which set {', '.join(missing)}; "
            "here they are not set"
        )
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size != plan.mesh.size:
        raise UserError(
            f"the plan is for {plan.mesh.size} ranks, but {size} were started; start {plan.mesh.size}, "
            f"or make a plan with --gpus {size}"
        )
    return rank, size


def _open_store(rank: int, size: int, timeout: timedelta) -> Store:
    """The rendezvous store that the launcher provides."""
    if dist.is_initialized():
        from torch.distributed.distributed_c10d import _get_default_store

        default: Store = _get_default_store()
        return default
    store: Store = next(rendezvous("env://", rank, size, timeout=timeout))[0]
    store.set_timeout(timeout)
    return store


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device of this process.

    Raises:
        UserError: there are fewer GPUs on this host than ranks.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return chosen
    index = chosen.index if ":" in str(chosen) else local
    if index >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local} needs GPU {index}, but this host has {torch.cuda.device_count()}; "
            "start fewer ranks, or use the CPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def name_of(rank: int) -> str:
    """How a rank names itself in messages."""
    return f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})"
