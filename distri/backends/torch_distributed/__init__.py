"""One process per rank: NCCL between GPUs, gloo between CPUs.

Read in this order: `routes` (who is sent what), `arena` (where it lies), `wire` (how it travels), `lane` (when), then
`transport`, which puts them together for the layers, and `backend`, which starts and ends them. `giving_way` keeps
gloo's threads from standing in their way.
"""

from __future__ import annotations

from distri.backends.torch_distributed.alarm import LostPeerError
from distri.backends.torch_distributed.backend import TorchBackend
from distri.backends.torch_distributed.transport import TorchTransport

__all__ = ["LostPeerError", "TorchBackend", "TorchTransport"]
