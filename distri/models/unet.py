"""`UNet2DConditionModel`: from a config alone to a layer graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from distri.core.graph import LayerGraph
from distri.errors import ModelError
from distri.models.capture import Probe, capture


def unet_arguments(config: Mapping[str, Any], probe: Probe) -> dict[str, Any]:
    """The keyword arguments of one forward pass, on the current default device."""
    arguments: dict[str, Any] = {
        "sample": torch.zeros(probe.batch, config["in_channels"], probe.rows, probe.cols),
        "timestep": torch.zeros(probe.batch),
        "encoder_hidden_states": torch.zeros(probe.batch, probe.text, text_width(config)),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(probe.batch, pooled),
            "time_ids": torch.zeros(probe.batch, 6),
        }
    return arguments


def text_width(config: Mapping[str, Any]) -> int:
    """Channels of the text embedding that cross-attention reads."""
    width = config["cross_attention_dim"]
    return int(width if isinstance(width, int) else width[0])


def capture_unet(
    name: str, config: Mapping[str, Any], probe: Probe | None = None, vae_factor: int = 8
) -> LayerGraph:
    """The layer graph of a UNet, from its config; no weights are in memory.

    Raises:
        ModelError: the config does not describe a UNet2DConditionModel that distri can split.
    """
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ModelError(f"{name}: a UNet2DConditionModel is required, not {config['_class_name']}")
    model = hollow_unet(name, config)
    chosen = probe or Probe(factor=2 ** (len(model.config["block_out_channels"]) - 1))
    return capture(
        name,
        model,
        lambda numbers: unet_arguments(model.config, numbers),
        latent_channels=model.config["in_channels"],
        text_width=text_width(model.config),
        vae_factor=vae_factor,
        probe=chosen,
    )


def hollow_unet(name: str, config: Mapping[str, Any]) -> Any:
    """The UNet of a config, on the meta device: no memory for its weights.

    Raises:
        ModelError: the config does not describe one.
    """
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(config))
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: not a usable UNet config: {error}") from error
