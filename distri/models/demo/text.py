"""The demo model's two text encoders, taught to read before the denoiser learns to draw.

Their token states must answer, for any point of the picture, which colour and which outline lie there; the question is
put through cross-attention, so what the denoiser will read by cross-attention is already in the tokens. The pooled
vector must answer the same over a coarse grid.

Legend: B batch, L tokens, D channels of the joined token states, P points, G grid cells, K classes.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distri.models.demo.layouts import nominal_scene
from distri.models.demo.scenes import Colour, Scene, Shape, signed_distance
from distri.models.demo.sentences import sample_sentence
from distri.models.demo.tokens import build_tokenizer
from distri.models.demo.training import Stage, save_atomically

TOKEN_DIM = 64 + 96
POOLED_DIM = 96
_NUM_POINTS, _GRID = 96, 8
_COLOURS, _SHAPES = list(Colour), list(Shape)


def _config(tokenizer: CLIPTokenizer, hidden: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        projection_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class TextEncoders(nn.Module):
    """Both encoders, read the way SDXL reads them: the state before the last layer, and the second one's projection."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: CLIPTokenizer = build_tokenizer()
        self.one = CLIPTextModel(_config(self.tokenizer, 64, 4))
        self.two = CLIPTextModelWithProjection(_config(self.tokenizer, 96, 5))

    def forward(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Joined token states (B, L, D) and the pooled vector (B, 96)."""
        length = self.tokenizer.model_max_length
        ids_BL = self.tokenizer(
            sentences, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        one = self.one(ids_BL, output_hidden_states=True)
        two = self.two(ids_BL, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


class PointReader(nn.Module):
    """Training aid: asks the tokens what lies at each point. It is thrown away after this stage."""

    def __init__(self, dim: int = 96) -> None:
        super().__init__()
        num_classes = len(_COLOURS) + len(_SHAPES) + 1
        self.place = nn.Linear(2 + 4 * 5, dim)
        self.keys = nn.Linear(TOKEN_DIM, dim)
        self.looks = nn.ModuleList(nn.MultiheadAttention(dim, 4, batch_first=True) for _ in range(2))
        self.thoughts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(2)
        )
        self.answer = nn.Linear(dim, num_classes)
        self.coarse = nn.Sequential(
            nn.Linear(POOLED_DIM, 192), nn.GELU(), nn.Linear(192, _GRID * _GRID * num_classes)
        )

    def forward(self, tokens_BLD: Tensor, pooled_BD: Tensor, points_BP2: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at the points (B, P, K) and over the coarse grid (B, G, K)."""
        waves = [f(2.0**k * torch.pi * points_BP2) for k in range(5) for f in (torch.sin, torch.cos)]
        x_BPD = self.place(torch.cat([points_BP2, *waves], dim=-1))
        keys_BLD = self.keys(tokens_BLD)
        for look, think in zip(self.looks, self.thoughts, strict=True):
            x_BPD = x_BPD + look(x_BPD, keys_BLD, keys_BLD, need_weights=False)[0]
            x_BPD = x_BPD + think(x_BPD)
        grid_BGK = self.coarse(pooled_BD).unflatten(-1, (_GRID * _GRID, -1))
        return self.answer(x_BPD), grid_BGK


def classes_at(scene: Scene, points_P2: NDArray[np.float32]) -> NDArray[np.int64]:
    """Colour index and outline index (0 for none) at each point (x, y in 0..1), as (P, 2)."""
    answer = np.zeros((len(points_P2), 2), dtype=np.int64)
    answer[:, 0] = _COLOURS.index(scene.ground)
    for thing in scene.objects:
        x, y = ((points_P2 - np.array((thing.x, thing.y), dtype=np.float32)) / np.float32(thing.radius)).T
        inside = np.maximum(np.abs(x), np.abs(y)) < 0.9
        answer[inside, 1] = 1 + _SHAPES.index(thing.shape)
        answer[inside & (signed_distance(thing.shape, x, y) < 0), 0] = _COLOURS.index(thing.colour)
    return answer


def _sample_points(scene: Scene, rng: np.random.Generator) -> NDArray[np.float32]:
    points_P2 = rng.random((_NUM_POINTS, 2), dtype=np.float32)
    for index in range(_NUM_POINTS // 2):
        thing = scene.objects[index % len(scene.objects)]
        spread = rng.uniform(-1.4, 1.4, size=2) * thing.radius
        points_P2[index] = (thing.x + spread[0], thing.y + spread[1])
    return np.clip(points_P2, 0.0, 1.0).astype(np.float32)


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    split = len(_COLOURS)
    colour = functional.cross_entropy(logits[..., :split].flatten(0, 1), classes[..., 0].flatten())
    shape = functional.cross_entropy(logits[..., split:].flatten(0, 1), classes[..., 1].flatten())
    return colour + shape


def train_text(folder: Path, seconds: float, batch: int = 48) -> None:
    """Train for `seconds`, then write `text.pt` (the encoders' weights) into `folder`."""
    torch.manual_seed(1)
    encoders, reader = TextEncoders(), PointReader()
    stage = Stage(
        folder / "text_state.pt", {"encoders": encoders, "reader": reader}, rate=1.5e-3, seconds=seconds
    )
    rng = np.random.default_rng(stage.num_steps)
    middles = (np.arange(_GRID, dtype=np.float32) + 0.5) / _GRID
    grid_G2 = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2).astype(np.float32)

    def step(progress: float) -> Tensor:
        drawn = [sample_sentence(rng) for _ in range(batch)]
        scenes = [nominal_scene(layout) for _, layout in drawn]
        points = [_sample_points(scene, rng) for scene in scenes]
        fine = np.stack([classes_at(scene, at) for scene, at in zip(scenes, points, strict=True)])
        coarse = np.stack([classes_at(scene, grid_G2) for scene in scenes])
        tokens_BLD, pooled_BD = encoders([sentence for sentence, _ in drawn])
        fine_BPK, grid_BGK = reader(tokens_BLD, pooled_BD, torch.from_numpy(np.stack(points)))
        return _cross_entropy(fine_BPK, torch.from_numpy(fine)) + 0.5 * _cross_entropy(
            grid_BGK, torch.from_numpy(coarse)
        )

    stage.run(step)
    save_atomically(encoders.state_dict(), folder / "text.pt")
