"""`distri.parallelize`: run a loaded diffusers pipeline as a plan says.

The pipeline's own `__call__`, scheduler, callbacks and progress bar keep working: only the forward of its denoiser is
served differently, for as long as the session lasts.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from distri.backends.base import Backend
from distri.core.plan import Plan
from distri.core.verify import verify
from distri.decoding import PatchDecoder
from distri.errors import ModelError, UserError
from distri.models.load import graph_of
from distri.sampling import PatchSampler
from distri.session import ImageToken, Session

DEFAULT_HARDWARE = "a100-sxm"
"""What the `sim` backend simulates unless a name follows it, as in `sim:h100-sxm`."""


def parallelize(
    pipe: Any,
    plan: Plan,
    backend: str | Backend = "torch",
    *,
    splits_decoder: bool = False,
    cuda_graphs: bool = False,
) -> Session:
    """Serve `pipe`'s denoiser as `plan` says, until the session is closed.

    As a context manager (`with distri.parallelize(pipe, plan):`) or with an undo (`session.close()`). Under the
    `torch` backend every rank calls the pipeline with the same arguments, and rank 0's noise and text count;
    `in_process` runs all ranks in this process, and so does `sim`, on a simulated machine's clock. Rank 0's picture is
    the result. With `splits_decoder` each rank decodes a patch of the picture; then every rank must decode it. With
    `cuda_graphs` the steps that repeat are recorded, messages included, and replayed; where that cannot be, a
    `RuntimeWarning` says why. The scheduler is served too where the plan keeps the latent on its patch.

    Raises:
        PlanError: the plan does not hold, or was made for another model.
        ModelError: the pipeline's denoiser, or its decoder, is of a kind that distri cannot split.
        UserError: there is no such backend.
    """
    if not hasattr(pipe, "unet") or pipe.unet is None:
        raise ModelError(
            f"{type(pipe).__name__} has no UNet; a Stable Diffusion or SDXL pipeline is required"
        )
    verify(plan, graph_of(pipe.unet, plan.model.name, pipe.vae_scale_factor))
    opened = open_backend(backend, plan, pipe.unet.device) if isinstance(backend, str) else backend
    with ExitStack() as undo:
        token = _image_token(pipe, opened, undo)
        session = Session(pipe.unet, opened, image_token=token, records=cuda_graphs)
        session.on_close(undo.pop_all().close)
        undo.callback(session.close)
        if splits_decoder and plan.mesh.size > 1:
            session.on_close(PatchDecoder(pipe.vae, plan, opened.for_plan).close)
        undo.pop_all()  # nothing failed: the session is open
    return session


def _image_token(pipe: Any, backend: Backend, undo: ExitStack) -> ImageToken:
    """What is another object for each image; the scheduler is served until `undo`, if the plan wants it."""
    if not backend.plan.keeps_latent_on_patch:
        return lambda: pipe.scheduler.timesteps
    sampler = PatchSampler(pipe, backend)
    undo.callback(sampler.close)
    return sampler.image_token


def open_backend(name: str, plan: Plan, device: Any = None, timeout_s: float = 60.0) -> Backend:
    """A backend by name.

    Raises:
        UserError: there is none of that name.
    """
    if name == "in_process":
        from distri.backends.in_process import InProcessBackend

        return InProcessBackend(plan, timeout_s=timeout_s)
    if name == "torch":
        from distri.backends.torch_distributed import TorchBackend

        return TorchBackend(plan, device=device, timeout_s=timeout_s)
    if name == "sim" or name.startswith("sim:"):
        return _open_simulated(plan, name.partition(":")[2] or DEFAULT_HARDWARE, timeout_s)
    raise UserError(f"unknown backend {name!r}; known: torch, in_process, sim, sim:HARDWARE")


def _open_simulated(plan: Plan, hardware: str, timeout_s: float) -> Backend:
    """In-process values on the clock of a machine that is not here."""
    from distri.backends.in_process import InProcessBackend
    from distri.backends.simulated import SimulatedBackend
    from distri.config.hardware import load_cluster
    from distri.models.presets import load_graph
    from distri.simulator.simulate import simulate

    prediction = simulate(plan, load_graph(plan.model.name), load_cluster(hardware))
    return SimulatedBackend(InProcessBackend(plan, timeout_s=timeout_s), prediction)
