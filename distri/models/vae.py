"""The decoder of an `AutoencoderKL`: from a config alone to a layer graph.

The decoder ends in pixels, so the picture itself is level 1 of this graph; the latent that it reads lies at the level
of its factor, 8 in Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL

from distri.core.graph import LayerGraph
from distri.errors import ModelError
from distri.models.capture import Probe, capture


def is_autoencoder(vae: object) -> bool:
    """Whether a decoder is of the kind that `capture_decoder` knows."""
    return isinstance(vae, AutoencoderKL)


def check_autoencoder(vae: object) -> None:
    """Hold that a decoder is of the kind that `capture_decoder` knows.

    Raises:
        ModelError: the VAE is of another kind.
    """
    if not is_autoencoder(vae):
        raise ModelError(f"a decoder of {type(vae).__name__} cannot be split; an AutoencoderKL is required")


def capture_decoder(name: str, config: Mapping[str, Any]) -> LayerGraph:
    """The layer graph of a decoder; no weights are in memory.

    Raises:
        ModelError: it has an operation that distri cannot split.
    """
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(dict(config))
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)

    def arguments(probe: Probe) -> dict[str, Any]:
        channels = vae.config["latent_channels"]
        return {"sample": torch.zeros(probe.batch, channels, probe.rows // factor, probe.cols // factor)}

    return capture(
        name,
        vae.decoder,
        arguments,
        latent_channels=vae.config["out_channels"],
        text_width=1,
        vae_factor=1,
        probe=Probe(factor=factor),
    )
