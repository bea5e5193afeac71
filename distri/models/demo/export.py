"""Put the trained parts into one folder that `StableDiffusionXLPipeline.from_pretrained` reads, in half precision."""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from distri.models.demo.text import TextEncoders
from distri.models.demo.tokens import write_plain_files
from distri.models.demo.unet import build_scheduler, build_unet
from distri.models.demo.vae import build_vae


def build_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """The pipeline of the weights in `folder` (`vae.pt`, `text.pt`, `unet.pt`), in float32."""
    vae, encoders, unet = build_vae(), TextEncoders(), build_unet()
    for module, name in ((vae, "vae"), (encoders, "text"), (unet, "unet")):
        module.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
        module.eval()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders.one,
        text_encoder_2=encoders.two,
        tokenizer=encoders.tokenizer,
        tokenizer_2=encoders.tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def export(folder: Path, destination: Path) -> None:
    """Write the half-precision checkpoint of the weights in `folder` to `destination`."""
    build_pipeline(folder).to(dtype=torch.float16).save_pretrained(destination, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        write_plain_files(destination / name)
