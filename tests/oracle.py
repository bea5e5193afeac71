"""What a plan means, written a second time: slow, in float64, and with nothing of `distri.nn` in it.

Every layer's input is kept whole, for every step, as its owners computed it. What a rank sees of it is a picture of
its own: its own region of this step, the others' regions of the step that the policy names. The layer is applied to
that whole picture and the rank's region of the result is cut out. So there are no halos here, no messages, no merging
of moments and no buffers: only the contract.

Shapes: B batch, C channels, H rows, W columns, N tokens, D channels of tokens, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Slices = tuple[slice, slice]


def convolved(x_BCHW, weight, bias, stride=1, dilation=1):
    """A convolution with as much zero padding as keeps the size (before the stride)."""
    down, across = weight.shape[2:]
    rows, cols = x_BCHW.shape[2:]
    top, left = dilation * (down - 1) // 2, dilation * (across - 1) // 2
    padded = np.pad(x_BCHW, ((0, 0), (0, 0), (top, top), (left, left)))
    total = 0.0
    for i in range(down):
        for j in range(across):
            view = padded[:, :, i * dilation : i * dilation + rows, j * dilation : j * dilation + cols]
            total = total + np.einsum("oc,bchw->bohw", weight[:, :, i, j], view[:, :, ::stride, ::stride])
    return total + bias[:, None, None]


def softmax(scores):
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def attended(queries_BND, keys_BTD, values_BTD, heads):
    def split(x):
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    queries, keys, values = map(split, (queries_BND, keys_BTD, values_BTD))
    weights = softmax(queries @ keys.transpose(0, 1, 3, 2) / np.sqrt(queries.shape[-1]))
    mixed = weights @ values
    return mixed.transpose(0, 2, 1, 3).reshape(queries_BND.shape)


def tokens(x_BCHW):
    return x_BCHW.reshape(*x_BCHW.shape[:2], -1).transpose(0, 2, 1)


def carried(last, before, first):
    """`last` and the smaller of the last two changes, where they have the same sign."""
    return last + smaller(last - before, before - first)


def grown(last, before, first):
    """The smaller of the last two growths, at most twofold, where both are growth or both are decay."""
    return np.exp2(smaller(*(np.clip(np.log2(p / q), -1, 1) for p, q in ((last, before), (before, first)))))


def smaller(change, earlier):
    agree = np.sign(change) == np.sign(earlier)
    return np.where(agree, np.sign(change) * np.minimum(abs(change), abs(earlier)), 0.0)


@dataclass
class Oracle:
    """A toy denoiser under a plan: `weights` by parameter, `patches` as ((top, bottom), (left, right)).

    policies: (during warm-up, afterwards) of each layer that exchanges anything. reaches: (near, every) of layers whose
    far context rests.
    """

    weights: Mapping[str, Array]
    stride: int
    dilation: int
    groups: int
    has_attention: bool
    patches: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    policies: Mapping[str, tuple[str, str]]
    warmup_steps: int
    reaches: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    late_steps_between_refreshes: int | None = None
    whole: dict[tuple[str, int], Array] = field(default_factory=dict)
    """The whole input of a layer at a step, each region as its owner computed it."""

    @property
    def is_split(self) -> bool:
        """Whether the layers know of other ranks at all: otherwise each patch is a picture of its own."""
        return any(policy != "local" for pair in self.policies.values() for policy in pair)

    def is_late(self, step: int) -> bool:
        """Whether a step is neither of warm-up nor a refresh."""
        every = self.late_steps_between_refreshes
        since = step - self.warmup_steps
        return since >= 0 and (every is None or since % (every + 1) != every)

    def region(self, rank: int, level: int) -> Slices:
        (top, bottom), (left, right) = self.patches[rank]
        return slice(top // level, -(-bottom // level)), slice(left // level, -(-right // level))

    def seen(self, layer: str, step: int, rank: int, level: int) -> tuple[Array, Array]:
        """What this rank sees of a layer's whole input, and where it sees anything (H, W)."""
        now = self.whole[layer, step]
        own = self.region(rank, level)
        policy = self.policy(layer, step)
        if policy == "local":
            picture, visible = np.zeros_like(now), np.zeros(now.shape[2:], bool)
        else:
            picture, visible = self.others(layer, step, policy).copy(), np.ones(now.shape[2:], bool)
            self.rest(layer, step, rank, level, picture)
        picture[(..., *own)] = now[(..., *own)]
        visible[own] = True
        return picture, visible

    def policy(self, layer: str, step: int) -> str:
        return self.policies.get(layer, ("local", "local"))[self.is_late(step)]

    def rest(self, layer: str, step: int, rank: int, level: int, picture: Array) -> None:
        """Put the far patches back to the version that was sent last: every so many steps after warm-up."""
        if layer not in self.reaches or not self.is_late(step):
            return
        near, every = self.reaches[layer]
        after_warmup = step - 1 - (self.warmup_steps - 1)
        version = step - 1 - after_warmup % every
        for patch in range(len(self.patches)):
            if abs(patch - rank) > near:
                far = self.region(patch, level)
                picture[(..., *far)] = self.whole[layer, version][(..., *far)]

    def others(self, layer: str, step: int, policy: str) -> Array:
        """The other ranks' values as they are read at this step."""
        if policy == "fresh":
            return self.whole[layer, step]
        if policy == "frozen":
            return self.whole[layer, self.warmup_steps - 1]
        last = self.whole[layer, step - 1]
        if policy == "extrapolated" and self.knows_two_changes(layer, step):
            return carried(last, self.whole[layer, step - 2], self.whole[layer, step - 3])
        return last

    def knows_two_changes(self, layer: str, step: int) -> bool:
        return self.was_read(layer, step - 2) and self.was_read(layer, step - 3)

    def was_read(self, layer: str, version: int) -> bool:
        """Whether anybody read this version: in its own step, or one step late."""
        if version < 0:
            return False
        return self.policy(layer, version) == "fresh" or self.is_late(version + 1)

    def layer(
        self, name: str, x_BCHW: Array, step: int, level: int, apply: Callable, out_level: int
    ) -> Array:
        """The whole output, put together from each rank's region of what it makes of what it sees."""
        self.whole[name, step] = x_BCHW
        result = None
        for rank in range(len(self.patches)):
            picture, visible = self.seen(name, step, rank, level)
            made = apply(picture, visible, self.region(rank, level))
            if result is None:
                result = np.full_like(made, np.nan)
            place = self.region(rank, out_level)
            result[(..., *place)] = made[(..., *place)]
        return result

    def step(self, sample_BCHW: Array, text_BTD: Array, step: int) -> Array:
        """The denoiser's output at a step."""
        deep = self.stride
        x = self.first(sample_BCHW, step)
        x = self.layer("norm", x, step, 1, self.norm(step), 1)
        x = x / (1 + np.exp(-x))
        x = self.layer("mid", x, step, 1, self.conv("mid", self.stride, self.dilation), deep)
        if self.has_attention:
            x = x + self.layer("attend", x, step, deep, self.attend(step), deep)
            x = x + self.read(x, text_BTD)
        x = x.repeat(deep, axis=2).repeat(deep, axis=3)
        return self.layer("conv_out", x, step, 1, self.conv("conv_out"), 1)

    def first(self, sample_BCHW: Array, step: int) -> Array:
        """Every rank has the whole latent, if it knows of others at all."""
        if self.is_split:
            return self.conv("conv_in")(sample_BCHW)
        return self.layer("conv_in", sample_BCHW, step, 1, self.conv("conv_in"), 1)

    def conv(self, name: str, stride: int = 1, dilation: int = 1) -> Callable:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return lambda picture, *_: convolved(picture, weight, bias, stride, dilation)

    def norm(self, step: int) -> Callable:
        if self.policy("norm", step) == "extrapolated" and self.knows_two_changes("norm", step):
            return lambda picture, _, own: self.normalised(
                picture, *self.expected_moments(picture, own, step)
            )
        if self.policy("norm", step) != "shifted":
            return lambda picture, visible, _: self.normalised(picture, *self.moments(picture[..., visible]))
        before = self.whole["norm", step - 1]

        def shifted(picture: Array, visible: Array, own: Slices) -> Array:
            mean, variance = self.moments(before.reshape(*before.shape[:2], -1))
            square = variance + mean**2
            old_mean, old_variance = self.moments(before[(..., *own)])
            new_mean, new_variance = self.moments(picture[(..., *own)])
            mean = mean + new_mean - old_mean
            variance = square + new_variance + new_mean**2 - old_variance - old_mean**2 - mean**2
            return self.normalised(picture, mean, np.where(variance < 0, new_variance, variance))

        return shifted

    def expected_moments(self, picture: Array, own: Slices, step: int) -> tuple[Array, Array]:
        """This rank's own moments, beside the others' carried forward: before it in the line, and after it."""
        rank = next(r for r in range(len(self.patches)) if self.region(r, 1) == own)
        parts = [(picture[(..., *own)][0, 0].size, *self.moments(picture[(..., *own)]))]
        for side in (range(rank), range(rank + 1, len(self.patches))):
            if not side:
                continue
            versions = []
            for version in (step - 1, step - 2, step - 3):
                whole = self.whole["norm", version]
                values = [whole[(..., *self.region(r, 1))].reshape(*whole.shape[:2], -1) for r in side]
                versions.append(self.moments(np.concatenate(values, -1)))
            (mean, variance), *_ = versions
            growth = grown(*(v for _, v in versions)) if np.all([v for _, v in versions]) else 1.0
            count = sum(self.whole["norm", step][(..., *self.region(r, 1))][0, 0].size for r in side)
            parts.append((count, carried(*(m for m, _ in versions)), variance * growth))
        total = sum(count for count, _, _ in parts)
        mean = sum(count * m for count, m, _ in parts) / total
        square = sum(count * (v + m**2) for count, m, v in parts) / total
        return mean, square - mean**2

    def moments(self, x_BCx: Array) -> tuple[Array, Array]:
        values = x_BCx.reshape(x_BCx.shape[0], self.groups, -1)
        return values.mean(-1), values.var(-1)

    def normalised(self, x_BCHW: Array, mean_BG: Array, variance_BG: Array) -> Array:
        grouped = x_BCHW.reshape(x_BCHW.shape[0], self.groups, -1, *x_BCHW.shape[2:])
        spread = (..., None, None, None)
        normal = ((grouped - mean_BG[spread]) / np.sqrt(variance_BG[spread] + 1e-5)).reshape(x_BCHW.shape)
        return normal * self.weights["norm.weight"][:, None, None] + self.weights["norm.bias"][:, None, None]

    def attend(self, step: int) -> Callable:
        is_carried = self.policy("attend", step) == "extrapolated" and self.knows_two_changes("attend", step)

        def attend(picture: Array, visible: Array, own: Slices) -> Array:
            known = tokens(picture)[:, visible.reshape(-1)]
            read = [self.linear("attend", part, known) for part in ("to_k", "to_v")]
            if is_carried:
                mine = np.zeros(visible.shape, bool)
                mine[own] = True
                for value, part in zip(read, ("to_k", "to_v"), strict=True):
                    versions = [self.whole["attend", step - back] for back in (1, 2, 3)]
                    late = carried(*(self.linear("attend", part, tokens(x)) for x in versions))
                    value[:, ~mine.reshape(-1)] = late[:, ~mine.reshape(-1)]
            return self.project("attend", picture, *read)

        return attend

    def read(self, x_BCHW: Array, text_BTD: Array) -> Array:
        return self.project(
            "read", x_BCHW, *(self.linear("read", part, text_BTD) for part in ("to_k", "to_v"))
        )

    def linear(self, name: str, part: str, value: Array) -> Array:
        return value @ self.weights[f"{name}.{part}.weight"].T

    def project(self, name: str, x_BCHW: Array, keys_BTD: Array, values_BTD: Array) -> Array:
        mixed = attended(self.linear(name, "to_q", tokens(x_BCHW)), keys_BTD, values_BTD, 2)
        out = self.linear(name, "to_out.0", mixed) + self.weights[f"{name}.to_out.0.bias"]
        return out.transpose(0, 2, 1).reshape(x_BCHW.shape)
