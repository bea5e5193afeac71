"""The demo model's autoencoder: AutoencoderKL at factor 8, its latent a small picture of the scene.

Three latent channels are held close to the block means of red, green and blue, the fourth is free to say where edges
run; diffusion over such a latent is easy to learn. After training the latent is normalised to zero mean and
unit deviation per channel by folding the affine map into the 1x1 quantisation convolutions, so `scaling_factor` is 1.

Legend: B batch, C channels, H, W pixels, h, w latent rows and columns (H / 8, W / 8).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from distri.models.demo.layouts import sample_scene
from distri.models.demo.scenes import render
from distri.models.demo.sentences import sample_sentence
from distri.models.demo.training import Stage, save_atomically

FACTOR = 8
_FREE_CHANNEL_DECAY = 0.01
_LATENT_NOISE = 0.05


def build_vae() -> AutoencoderKL:
    """A fresh autoencoder of four levels; no attention in the middle, so crops and whole pictures are alike."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=512,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def picture_crops(rng: np.random.Generator, batch: int, size: int) -> Tensor:
    """Crops of pictures drawn at several resolutions, as a (B, 3, size, size) tensor in -1..1."""
    crops = []
    for _ in range(batch):
        full = max(size, int(rng.choice((128, 256, 256, 512))))
        scene = sample_scene(sample_sentence(rng)[1], rng)
        image_HWC = render(scene, full, full)
        thing = scene.objects[rng.integers(len(scene.objects))]
        spot = np.array((thing.y, thing.x)) + rng.uniform(-0.15, 0.15, size=2)
        top, left = (int(np.clip(at * full - size / 2, 0, full - size)) for at in spot)
        crops.append(image_HWC[top : top + size, left : left + size])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) * 2 - 1


def vae_loss(vae: AutoencoderKL, x_BCHW: Tensor) -> Tensor:
    """Reconstruction plus the pull of the first three latent channels towards block means."""
    z_BChw = vae.encode(x_BCHW).latent_dist.mean
    rebuilt_BCHW = vae.decode(z_BChw + _LATENT_NOISE * torch.randn_like(z_BChw)).sample
    error_BCHW = rebuilt_BCHW - x_BCHW
    pull = functional.mse_loss(z_BChw[:, :3], functional.avg_pool2d(x_BCHW, FACTOR))
    free = z_BChw[:, 3].square().mean()
    loss: Tensor = (
        error_BCHW.abs().mean() + 2 * error_BCHW.square().mean() + 0.5 * pull + _FREE_CHANNEL_DECAY * free
    )
    return loss


@torch.no_grad()
def normalise_latent(vae: AutoencoderKL, batches: Iterator[Tensor]) -> None:
    """Fold zero mean and unit deviation per latent channel into `quant_conv` and `post_quant_conv`, in place."""
    z_CN = torch.cat([vae.encode(x).latent_dist.mean.permute(1, 0, 2, 3).flatten(1) for x in batches], dim=1)
    mean_C, std_C = z_CN.mean(dim=1), z_CN.std(dim=1)
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += (out.weight[:, :, 0, 0] * mean_C).sum(dim=1)
    out.weight *= std_C[None, :, None, None]
    into.weight[:4] /= std_C[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean_C) / std_C
    into.weight[4:] = 0.0
    into.bias[4:] = -12.0


def train_vae(folder: Path, seconds: float) -> None:
    """Train for `seconds`, then normalise the latent and write `vae.pt` (weights only) into `folder`."""
    torch.manual_seed(0)
    vae = build_vae()
    stage = Stage(folder / "vae_state.pt", {"vae": vae}, rate=3e-3, seconds=seconds)
    rng = np.random.default_rng(stage.num_steps)

    def step(progress: float) -> Tensor:
        size, batch = (64, 16) if progress < 0.8 else (128, 6)
        with torch.autocast("cpu", torch.bfloat16):
            return vae_loss(vae, picture_crops(rng, batch, size))

    stage.run(step)
    normalise_latent(vae, (picture_crops(rng, 8, 256) for _ in range(16)))
    save_atomically(vae.state_dict(), folder / "vae.pt")


def decoder_loss(vae: AutoencoderKL, x_BCHW: Tensor) -> Tensor:
    """Reconstruction from the encoder's latent, roughened a little, as the denoiser's latents are."""
    with torch.no_grad():
        z_BChw = vae.encode(x_BCHW).latent_dist.mean
    error_BCHW = vae.decode(z_BChw + _LATENT_NOISE * torch.randn_like(z_BChw)).sample - x_BCHW
    loss: Tensor = error_BCHW.abs().mean() + 2 * error_BCHW.square().mean()
    return loss


def train_decoder(folder: Path, seconds: float) -> None:
    """Train the decoder alone on the normalised latent, which stays as the denoiser knows it; rewrites `vae.pt`."""
    torch.manual_seed(3)
    vae = build_vae()
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    stage = Stage(folder / "decoder_state.pt", {"vae": vae}, rate=2e-3, seconds=seconds)
    rng = np.random.default_rng(5000 + stage.num_steps)

    def step(progress: float) -> Tensor:
        size, batch = ((64, 16), (128, 4), (256, 1))[int(rng.choice(3, p=(0.5, 0.35, 0.15)))]
        with torch.autocast("cpu", torch.bfloat16):
            return decoder_loss(vae, picture_crops(rng, batch, size))

    stage.run(step)
    save_atomically(vae.state_dict(), folder / "vae.pt")
