"""What a layer finds of the rank that runs it: its exchanger, its patch, and what is kept for one image.

Several ranks may share one model in one process (the in-process backend runs each in a thread of its own), so the
layers hold a `RankLocal`, which gives each thread the context of its rank.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from torch import Tensor

from distri.core.exchanger import Exchanger
from distri.core.shape import Rect


@dataclass
class RankContext:
    """One rank's run of one model.

    latent_BCHW: the whole latent of this rank's guidance branch at the current step. image_memo: tensors that stay the
    same during an image, by layer or argument, each beside the tensor that it was made from.
    """

    exchanger: Exchanger[Tensor]
    latent_BCHW: Tensor | None = None
    image_memo: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict)

    @property
    def patches(self) -> tuple[Rect, ...]:
        """All patches of the current step, as rectangles of the latent."""
        return self.exchanger.plan.partition.at_step(self.exchanger.step)

    @property
    def patch(self) -> int:
        """This rank's place in the split."""
        return self.exchanger.patch

    def begin_image(self) -> None:
        """Forget what belonged to the last image."""
        self.image_memo.clear()
        self.exchanger.begin_image()


class RankLocal(threading.local):
    """The context of the rank that the current thread runs."""

    context: RankContext | None = None

    def current(self) -> RankContext:
        """The context; layers are only ever run by a rank."""
        assert self.context is not None, "a parallel layer ran outside a session"
        return self.context
