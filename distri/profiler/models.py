"""The denoiser that a profile is of: its modules' numbers from the config alone, or itself with random weights."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from distri.models.capture import Probe
from distri.models.demo import checkpoint_path
from distri.models.presets import DATA, PRESETS, read_unet_config
from distri.models.unet import hollow_unet, unet_arguments
from distri.profiler.subjects import TEXT_TOKENS

LARGEST_CPU_BYTES = 4 * 2**30
"""Weights beyond this are not put into a host's memory for the sake of a whole step's time."""


def config_of(model: str) -> dict[str, Any]:
    """The UNet's config of a preset or a directory."""
    shipped = DATA / f"{model}-unet.json"
    if model in PRESETS and shipped.is_file():
        config: dict[str, Any] = json.loads(shipped.read_text(encoding="utf-8"))
        return config
    return read_unet_config(str(checkpoint_path()) if model == "demo" else model)


def build_hollow(model: str) -> nn.Module:
    """The UNet of a preset or a directory, without memory for its weights."""
    hollow: nn.Module = hollow_unet(model, config_of(model))
    return hollow.eval()


def heads_of(hollow: nn.Module) -> dict[str, int]:
    """Number of heads of every attention, by path."""
    return {path: int(module.heads) for path, module in hollow.named_modules() if hasattr(module, "to_q")}


def fits(hollow: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the weights may be allocated on the device."""
    needed = sum(parameter.numel() for parameter in hollow.parameters()) * dtype.itemsize
    if device.type == "cuda":
        return needed < 0.8 * torch.cuda.mem_get_info(device)[0]
    return needed < LARGEST_CPU_BYTES


def fill(hollow: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The UNet with small random weights: times do not depend on their values, but must not meet denormals."""
    model = nn.Module.to(hollow, dtype).to_empty(device=device).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
        for buffer in model.buffers():
            buffer.zero_()
    return model


def step_arguments(
    model: Any, batch: int, rows: int, cols: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments of one whole forward pass."""
    with torch.device(device):
        arguments = unet_arguments(model.config, Probe(batch, TEXT_TOKENS, rows, cols, 1))
    arguments["timestep"] = torch.full((batch,), 500.0, device=device)
    arguments["sample"] = torch.randn(arguments["sample"].shape, device=device).to(dtype)
    text = arguments["encoder_hidden_states"]
    arguments["encoder_hidden_states"] = torch.randn(text.shape, device=device).to(dtype)
    added = arguments.get("added_cond_kwargs")
    if added is not None:
        added["text_embeds"] = added["text_embeds"].to(dtype)
    return arguments
