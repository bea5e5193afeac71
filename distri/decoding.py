"""A VAE's decoder on all ranks: each decodes its own patch of the picture.

A picture is decoded once, so there is no earlier step to read: every exchange is fresh, and the picture is that of one
device. The layers are those that serve the denoiser. All ranks take part, those of the other guidance branch too.

Shape suffixes: B batch, C channels, h, w rows and columns of the latent, H, W of the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from distri.backends.base import Backend
from distri.core.exchanger import Exchanger
from distri.core.plan import ImageRequest, Plan
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.models.attach import Attachment, ReplacedForward, attach_layers
from distri.models.vae import capture_decoder, check_autoencoder
from distri.nn.conv2d import cut
from distri.nn.rank_context import RankContext
from distri.ranks import LocalRanks, put_together

OpenBackend = Callable[[Plan], Backend]


def decoder_plan(vae: Any, plan: Plan, dtype: str) -> Plan:
    """The plan of one decoding of `plan`'s picture, in rows, on as many ranks.

    Raises:
        PartitionError: the picture has too few rows for that.
    """
    image = ImageRequest(plan.image.height, plan.image.width, 1, False, plan.image.num_images)
    request = PlanRequest(image, plan.mesh.size, False, policy_table("full_sync"), 1, dtype=dtype)
    return make_plan(request, capture_decoder(f"decoder of {plan.model.name}", vae.config))


class PatchDecoder:
    """Serves `vae.decoder` until it is closed, for pictures of the size that was planned; others run as they are.

    Under a backend of several processes all of them must decode. What it takes is opened at the first picture.

    Raises:
        ModelError: the VAE is not an AutoencoderKL.
        PartitionError: the picture has too few rows.
    """

    def __init__(self, vae: Any, plan: Plan, open_backend: OpenBackend) -> None:
        check_autoencoder(vae)
        self._vae, self._denoising, self._open_backend = vae, plan, open_backend
        self._plan = decoder_plan(vae, plan, plan.dtype)
        self._factor = plan.model.vae_factor
        self._opened: tuple[Backend, LocalRanks] | None = None
        self._attachment = Attachment()
        self._attachment.add(vae.decoder, _DecoderHook(self))

    def close(self) -> None:
        """Take the hook off and let the backend go. May be called twice."""
        self._attachment.remove()
        if self._opened is not None:
            backend, ranks = self._opened
            ranks.close()
            backend.close()

    def decode(self, original: Callable[..., Tensor], z_BChw: Tensor, *more: Any) -> Tensor:
        """The picture (B, C, H, W) of rank 0's latent."""
        image = self._plan.image
        planned = (image.num_images, image.height // self._factor, image.width // self._factor)
        if more or (z_BChw.shape[0], *z_BChw.shape[2:]) != planned:
            return original(z_BChw, *more)
        backend, ranks = self._open(z_BChw)
        latent_BChw: Tensor = backend.broadcast(z_BChw.contiguous())
        for context in ranks.contexts.values():
            context.begin_image()
            context.exchanger.begin_step()
        layers = Attachment()
        try:
            attach_layers(layers, self._vae.decoder, self._plan, ranks.local)
            parts = ranks.run(lambda context: self._decode_patch(context, original, latent_BChw))[0]
        finally:
            layers.remove()
        return put_together(dict(enumerate(parts)), self._plan, self._plan.partition.patches)

    def _decode_patch(
        self, context: RankContext, original: Callable[..., Tensor], latent_BChw: Tensor
    ) -> list[Tensor]:
        context.latent_BCHW = latent_BChw
        own, whole = (r.at_level(self._factor) for r in (context.patches[context.patch], self._plan.latent))
        return list(context.exchanger.gather(original(cut(latent_BChw, own, whole).contiguous())))

    def _open(self, z_BChw: Tensor) -> tuple[Backend, LocalRanks]:
        """The backend and the ranks, of the dtype that is decoded in."""
        if self._opened is None:
            dtype = str(z_BChw.dtype).removeprefix("torch.")  # SDXL's decoder is wider than its denoiser
            if dtype != self._plan.dtype:
                self._plan = decoder_plan(self._vae, self._denoising, dtype)
            backend = self._open_backend(self._plan)
            exchangers = {r: Exchanger(self._plan, r, backend.transport(r)) for r in backend.local_ranks}
            contexts = {rank: RankContext(exchanger) for rank, exchanger in exchangers.items()}
            self._opened = backend, LocalRanks(backend, contexts)
        return self._opened


class _DecoderHook(ReplacedForward):
    """The hook on the decoder itself."""

    def __init__(self, decoder: PatchDecoder) -> None:
        super().__init__(lambda _, __, value: value)
        self._decoder = decoder

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by diffusers instead of the decoder's forward."""
        return self._decoder.decode(self.fn_ref.original_forward, *args, *kwargs.values())
