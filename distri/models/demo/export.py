"""The trained parts as one folder for `StableDiffusionXLPipeline.from_pretrained`, in half precision; and back."""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from distri.models.demo.text import TextEncoders
from distri.models.demo.tokens import write_plain_files
from distri.models.demo.training import save_atomically
from distri.models.demo.unet import START, build_scheduler, build_unet
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


def take_apart(source: Path, folder: Path) -> None:
    """Write the weights of the checkpoint at `source` to where training goes on from, unless it already does."""
    if (folder / START).exists():
        return
    pipeline = StableDiffusionXLPipeline.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    encoders = TextEncoders()
    encoders.one.load_state_dict(pipeline.text_encoder.state_dict())
    encoders.two.load_state_dict(pipeline.text_encoder_2.state_dict())
    save_atomically(pipeline.vae.state_dict(), folder / "vae.pt")
    save_atomically(encoders.state_dict(), folder / "text.pt")
    save_atomically(pipeline.unet.state_dict(), folder / START)
