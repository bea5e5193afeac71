"""The ranks of this process: the context that each one's layers find, and a thread for each if there are several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from torch import Tensor

from distri.backends.base import Backend
from distri.core.plan import Plan
from distri.core.shape import Rect
from distri.nn.rank_context import RankContext, RankLocal

R = TypeVar("R")


class LocalRanks:
    """Runs one task for every rank of this process; if one of them fails, those that wait for it are released.

    local: where the layers of a rank find its context. contexts: by rank.
    """

    def __init__(self, backend: Backend, contexts: Mapping[int, RankContext]) -> None:
        self.local = RankLocal()
        self.contexts = contexts
        self._backend = backend
        self._threads = ThreadPoolExecutor(len(contexts), "rank") if len(contexts) > 1 else None

    def run(self, task: Callable[[RankContext], R]) -> list[R]:
        """What `task` returns for each rank, in rank order.

        Raises:
            BaseException: what a rank raised; of several, the one that caused the others.
        """
        if self._threads is None:
            (context,) = self.contexts.values()
            return [self._run_one(context, task)]
        threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

        def in_thread(context: RankContext) -> R:
            torch.set_num_threads(max(1, threads // len(self.contexts)))
            with torch.set_grad_enabled(grad):
                return self._run_one(context, task)

        return _results([self._threads.submit(in_thread, context) for context in self.contexts.values()])

    def _run_one(self, context: RankContext, task: Callable[[RankContext], R]) -> R:
        self.local.context = context
        try:
            return task(context)
        except BaseException as error:
            self._backend.abort(error)
            raise
        finally:
            self.local.context = None

    def close(self) -> None:
        """Let the threads go."""
        if self._threads is not None:
            self._threads.shutdown(wait=True)


def _results(futures: Sequence[Future[Any]]) -> list[Any]:
    """Every result, or the first rank's own error rather than that of a rank which waited for it."""
    wait(futures, return_when=FIRST_EXCEPTION)
    wait(futures)
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise next((error for error in errors if error.__cause__ is None), errors[0])
    return [future.result() for future in futures]


def put_together(parts: Mapping[int, Tensor], plan: Plan, patches: Sequence[Rect]) -> Tensor:
    """The ranks' outputs (B, C, rows, columns) in their places: branches along the batch, patches by their rectangles.

    Zero where no rank's is given.
    """
    mesh, latent = plan.mesh, plan.latent
    first = next(iter(parts.values()))
    shape = (first.shape[0] * mesh.cfg, first.shape[1], latent.rows.size, latent.cols.size)
    whole_BCHW = first.new_empty(shape) if len(parts) == mesh.size else first.new_zeros(shape)
    for rank, part in parts.items():
        patch = patches[mesh.patch_of(rank)]
        half = whole_BCHW.chunk(mesh.cfg, dim=0)[mesh.branch_of(rank)]
        half[..., patch.rows.start : patch.rows.stop, patch.cols.start : patch.cols.stop] = part
    return whole_BCHW
