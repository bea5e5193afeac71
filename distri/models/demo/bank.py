"""Latents to train on, drawn fresh and kept for a while: encoding a picture costs as much as half a training step.

Invariant: a latent is always stored with the layout it shows; its sentence is worded anew each time it is drawn.
Only the training side of the split is ever in a bank.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from distri.models.demo.layouts import Layout, sample_scene
from distri.models.demo.scenes import render
from distri.models.demo.sentences import sample_sentence, say

_CAPACITY = 6000
_FRESH_SHARE = 0.25


class SceneBank:
    """Latents of one picture size, (4, h, w) each, in half precision."""

    def __init__(self, vae: AutoencoderKL, height: int, width: int, rng: np.random.Generator) -> None:
        self._vae, self._height, self._width, self._rng = vae, height, width, rng
        self._kept: list[tuple[Tensor, Layout]] = []

    @torch.no_grad()
    def _encode(self, count: int) -> list[tuple[Tensor, Layout]]:
        layouts = [sample_sentence(self._rng)[1] for _ in range(count)]
        pictures = [render(sample_scene(layout, self._rng), self._height, self._width) for layout in layouts]
        x_B3HW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            z_B4hw = self._vae.encode(x_B3HW).latent_dist.mean
        return list(zip(z_B4hw.half(), layouts, strict=True))

    def draw(self, batch: int) -> tuple[Tensor, list[str]]:
        """Latents (B, 4, h, w) and a sentence for each; a quarter are new, all while the bank is small."""
        num_fresh = batch if len(self._kept) < 4 * batch else max(1, round(batch * _FRESH_SHARE))
        fresh = self._encode(num_fresh)
        old = [
            self._kept[int(i)] for i in self._rng.integers(max(1, len(self._kept)), size=batch - num_fresh)
        ]
        for pair in fresh:
            if len(self._kept) < _CAPACITY:
                self._kept.append(pair)
            else:
                self._kept[int(self._rng.integers(_CAPACITY))] = pair
        drawn = fresh + old
        return torch.stack([z for z, _ in drawn]).float(), [say(layout, self._rng) for _, layout in drawn]
