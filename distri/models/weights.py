"""What a loaded denoiser is: a digest of its weights, and the object that its forward returns."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

SAMPLES = 256


def weights_digest(model: nn.Module) -> str:
    """A digest over every parameter's name, shape and dtype, and `SAMPLES` of its values spread evenly.

    Two fine-tunes of one model differ in nearly every value, so a sample tells them apart; reading all of several
    gigabytes at every start would not be worth what it adds.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def denoiser_output(sample_BCHW: Tensor, return_dict: bool) -> Any:
    """A result as the denoiser itself would wrap it."""
    return UNet2DConditionOutput(sample=sample_BCHW) if return_dict else (sample_BCHW,)
