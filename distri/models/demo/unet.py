"""The demo model's denoiser: SDXL's kinds of blocks at a hundredth of its width, trained with v-prediction.

Three levels: plain convolutions at the first, self- and cross-attention at the next two, so a latent's rows must
come in fours. Small pictures teach the words first; larger ones join as training goes on, and the resolution is
told to the denoiser as SDXL tells it (`time_ids` = original height and width, crop 0 0, target height and width).

Legend: B batch, h, w latent rows and columns, L tokens, D token channels.
"""

import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.nn import functional

from distri.models.demo.bank import SceneBank
from distri.models.demo.text import POOLED_DIM, TOKEN_DIM, TextEncoders
from distri.models.demo.training import Stage, save_atomically
from distri.models.demo.vae import build_vae

TIME_ID_DIM = 32
_DROP_WORDS = 0.1
_NOISY_SIDE = 1.5
_EMA_DECAY = 0.9995
_OUTLINE_WEIGHT = 8.0

SIZES = ((128, 128), (256, 256), (384, 384), (512, 512), (256, 512), (512, 256))
"""Pictures trained on, (height, width) in pixels."""

_TIME_SHARES = (
    (0.25, (0.80, 0.20, 0.00, 0.00, 0.00, 0.00)),
    (0.40, (0.25, 0.52, 0.05, 0.10, 0.04, 0.04)),
    (0.80, (0.06, 0.64, 0.04, 0.20, 0.03, 0.03)),
    (1.01, (0.02, 0.38, 0.06, 0.44, 0.05, 0.05)),
)
_PIXELS_PER_BATCH = 10 * 256 * 256
_LARGEST_BATCH = 28
_RATE, _RATE_OF_MORE = 8e-4, 5e-4

START = "unet_start.pt"
"""Weights that the training of a denoiser begins with, in its folder; without the file it begins with random ones."""


def build_unet() -> UNet2DConditionModel:
    """A fresh denoiser."""
    return UNet2DConditionModel(
        sample_size=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=TOKEN_DIM,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_DIM,
        projection_class_embeddings_input_dim=POOLED_DIM + 6 * TIME_ID_DIM,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule trained on: SDXL's, rescaled to end in pure noise, so that grounds keep their colour."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def sample_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """Timesteps (B,), one per equal share of the schedule, leaning to the noisy side where the layout is decided."""
    at_B = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return (1000 * (1 - at_B**_NOISY_SIDE)).long().clamp(0, 999)


def outline_weight(z_B4hw: Tensor) -> Tensor:
    """Weights (B, 1, h, w) of mean one, larger where colours meet: outlines are few cells, and words are told by them.

    A weight that depends on the place alone leaves the best denoiser what it was.
    """
    colours_B3hw = z_B4hw[:, :3]
    highest = functional.max_pool2d(colours_B3hw, 3, stride=1, padding=1)
    lowest = -functional.max_pool2d(-colours_B3hw, 3, stride=1, padding=1)
    contrast_B1hw = (highest - lowest).amax(dim=1, keepdim=True)
    weight_B1hw = 1 + _OUTLINE_WEIGHT * contrast_B1hw.clamp(max=1.0)
    return weight_B1hw / weight_B1hw.mean()


def denoising_loss(
    unet: nn.Module,
    scheduler: DDIMScheduler,
    z_B4hw: Tensor,
    words: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the predicted velocity; `words` are token states (B, L, D) and the pooled vector."""
    batch, _, rows, columns = z_B4hw.shape
    steps_B = sample_timesteps(batch, generator)
    noise_B4hw = torch.randn(z_B4hw.shape, generator=generator)
    noisy_B4hw = scheduler.add_noise(z_B4hw, noise_B4hw, steps_B)
    target_B4hw = scheduler.get_velocity(z_B4hw, noise_B4hw, steps_B)
    height, width = 8 * rows, 8 * columns
    time_ids_B6 = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(batch, -1)
    added = {"text_embeds": words[1], "time_ids": time_ids_B6}
    with torch.autocast("cpu", torch.bfloat16):
        guess_B4hw = unet(noisy_B4hw, steps_B, words[0], added_cond_kwargs=added).sample
    error_B4hw = (guess_B4hw.float() - target_B4hw).square()
    loss: Tensor = (error_B4hw * outline_weight(z_B4hw)).mean()
    return loss


def _pick_size(progress: float, rng: np.random.Generator) -> int:
    shares = next(shares for until, shares in _TIME_SHARES if progress < until)
    return int(rng.choice(len(SIZES), p=shares))


def _load_frozen(folder: Path) -> tuple[AutoencoderKL, TextEncoders]:
    vae, encoders = build_vae(), TextEncoders()
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True))
    encoders.load_state_dict(torch.load(folder / "text.pt", weights_only=True))
    return vae.eval().requires_grad_(False), encoders.eval().requires_grad_(False)


def train_unet(folder: Path, seconds: float, peer: int = 0) -> None:
    """Train for `seconds` as process `peer` of those that share the gradients.

    The running mean of the weights is written to `unet.pt` in `folder` every 250 steps. From `START` on, pictures are
    at once as large as they are at the end of a whole training, and the learning rate is lower.
    """
    torch.manual_seed(2)
    vae, encoders = _load_frozen(folder)
    unet, mean, scheduler = build_unet(), build_unet().requires_grad_(False), build_scheduler()
    unet.set_attn_processor(
        AttnProcessor()
    )  # plain products: half the time of the fused kernel for heads this small
    is_more = (folder / START).exists()
    if is_more:
        unet.load_state_dict(torch.load(folder / START, weights_only=True))
    mean.load_state_dict(unet.state_dict())
    rate = _RATE_OF_MORE if is_more else _RATE
    stage = Stage(folder / "unet_state.pt", {"unet": unet, "mean": mean}, rate=rate, seconds=seconds)
    seed = 1000 + stage.num_steps
    same_rng = np.random.default_rng(seed)
    rng = np.random.default_rng([seed, peer])
    generator = torch.Generator().manual_seed(7919 * seed + peer)
    banks = [SceneBank(vae, height, width, rng) for height, width in SIZES]
    ours, theirs = list(unet.parameters()), list(mean.parameters())

    def step(progress: float) -> Tensor:
        index = _pick_size(1.0 if is_more else progress, same_rng)
        height, width = SIZES[index]
        z_B4hw, sentences = banks[index].draw(min(_LARGEST_BATCH, _PIXELS_PER_BATCH // (height * width)))
        kept = ["" if rng.random() < _DROP_WORDS else sentence for sentence in sentences]
        with torch.no_grad():
            words = encoders(kept)
        return denoising_loss(unet, scheduler, z_B4hw, words, generator)

    @torch.no_grad()
    def after() -> None:
        decay = min(_EMA_DECAY, (1 + stage.num_steps) / (10 + stage.num_steps))
        torch._foreach_lerp_(theirs, ours, 1 - decay)
        if stage.leads and stage.num_steps % 250 == 0:
            save_atomically(mean.state_dict(), folder / "unet.pt")

    stage.run(step, after)
    if stage.leads:
        save_atomically(mean.state_dict(), folder / "unet.pt")


def _join_and_train(peer: int, peers: int, folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # else two peers may share one core and leave the other idle
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[peer % len(cores)]})
    meeting = dist.FileStore(str(folder / "peers.store"), peers)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=meeting, rank=peer, world_size=peers)
    train_unet(folder, seconds, peer)
    dist.destroy_process_group()


def train_unet_by_peers(folder: Path, seconds: float, peers: int) -> None:
    """Train in `peers` processes of one thread each: on a shared machine they wait for each other once a step only."""
    (folder / "peers.store").unlink(missing_ok=True)
    multiprocessing.spawn(_join_and_train, args=(peers, folder, seconds), nprocs=peers)  # type: ignore[attr-defined,no-untyped-call]
