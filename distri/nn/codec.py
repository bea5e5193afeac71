"""The codecs in torch: tensors to payloads and back (see `distri.core.codec` for the formats).

Shape suffixes: V values of one channel, K channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distri.core.codec import SCALE_BYTES, Codec

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def channels_last(part: Tensor) -> Tensor:
    """A part as (K, V): halos (B, C, H, W) have B times C channels, contexts (L, B, E) B times E."""
    if part.dim() == 4:
        return part.reshape(part.shape[0] * part.shape[1], -1)
    return part.reshape(part.shape[0], -1).t()


def restore(values_KV: Tensor, like: torch.Size) -> Tensor:
    """The inverse of `channels_last` for a part of shape `like`."""
    if len(like) == 4:
        return values_KV.reshape(like)
    return values_KV.t().reshape(like)


def encode(codec: Codec, values_KV: Tensor) -> Tensor:
    """The payload (bytes as uint8) of values."""
    values_KV = values_KV.float()
    largest = FP8_MAX if codec is Codec.FP8 else float(2 ** (codec.bits - 1) - 1)
    scales_K1 = values_KV.abs().amax(dim=1, keepdim=True) / largest
    scales_K1 = scales_K1.to(torch.bfloat16)
    scaled_KV = values_KV / scales_K1.float().clamp_min(torch.finfo(torch.float32).tiny)
    if codec is Codec.FP8:
        body = scaled_KV.clamp(-largest, largest).to(FP8).view(torch.uint8)
    else:
        integers_KV = scaled_KV.round().clamp(-largest, largest).to(torch.int16)
        body = _pack(integers_KV, codec.bits)
    return torch.cat((body.reshape(-1), scales_K1.contiguous().view(torch.uint8).reshape(-1)))


def decode(codec: Codec, payload: Tensor, num_channels: int, num_values: int) -> Tensor:
    """The values (K, V) of a payload, in fp32."""
    split = payload.numel() - num_channels * SCALE_BYTES
    scales_K1 = payload[split:].clone().view(torch.bfloat16).view(num_channels, 1).float()
    body = payload[:split].view(num_channels, -1)
    if codec is Codec.FP8:
        return body.contiguous().view(FP8).float() * scales_K1
    return _unpack(body, codec.bits)[:, :num_values].float() * scales_K1


def _pack(integers_KV: Tensor, bits: int) -> Tensor:
    """Signed integers of `bits` bits, several to a byte; the first in the lowest bits."""
    per_byte = 8 // bits
    offset_KV = (integers_KV + 2 ** (bits - 1)).to(torch.uint8)
    padded_KV = F.pad(offset_KV, (0, -offset_KV.shape[1] % per_byte))
    groups = padded_KV.view(padded_KV.shape[0], -1, per_byte)
    packed = groups[..., 0].clone()
    for place in range(1, per_byte):
        packed |= groups[..., place] << (bits * place)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    parts = [(packed >> (bits * place)) & (2**bits - 1) for place in range(per_byte)]
    offset_KV = torch.stack(parts, dim=-1).view(packed.shape[0], -1).to(torch.int16)
    return torch.sub(offset_KV, 2 ** (bits - 1))
