"""A scene is a value: flat shapes over a shaded ground, in units of the picture, drawable at any resolution.

Invariant: `render(scene, h, w)` depends on nothing but its arguments, and two resolutions of the same scene are
the same picture. Edges are antialiased from signed distances, so no supersampling is needed.

Legend: H, W = picture height and width in pixels; centres are fractions of width and height; radii, fractions of the
shorter side; colours are sRGB in 0..1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Word(str, Enum):
    """A member is its own word, in text and in comparisons."""

    __str__ = str.__str__

    def __format__(self, form: str) -> str:
        return format(self.value, form)


class Colour(Word):
    """The palette, by its words."""

    RED = "red"
    ORANGE = "orange"
    YELLOW = "yellow"
    GREEN = "green"
    BLUE = "blue"
    PURPLE = "purple"
    WHITE = "white"
    BLACK = "black"
    GREY = "grey"


class Shape(Word):
    """The outlines, by their words."""

    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    DIAMOND = "diamond"
    CROSS = "cross"
    RING = "ring"


RGB: dict[Colour, tuple[float, float, float]] = {
    Colour.RED: (0.86, 0.14, 0.16),
    Colour.ORANGE: (0.97, 0.56, 0.10),
    Colour.YELLOW: (0.97, 0.90, 0.26),
    Colour.GREEN: (0.18, 0.66, 0.30),
    Colour.BLUE: (0.15, 0.32, 0.84),
    Colour.PURPLE: (0.56, 0.22, 0.72),
    Colour.WHITE: (0.95, 0.95, 0.95),
    Colour.BLACK: (0.08, 0.08, 0.08),
    Colour.GREY: (0.56, 0.56, 0.56),
}


@dataclass(frozen=True)
class Object:
    """One flat shape: `x`, `y` its centre (0..1 of width, height), `radius` its reach (0..1 of the shorter side)."""

    shape: Shape
    colour: Colour
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Objects, drawn in order, over a ground whose brightness rises by `slope` along `angle` (radians)."""

    objects: tuple[Object, ...]
    ground: Colour = Colour.GREY
    slope: float = 0.0
    angle: float = 0.0


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - np.float32(1.0)


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.86)


def _diamond(x: Floats, y: Floats) -> Floats:
    return (np.abs(x) + np.abs(y) - np.float32(1.12)) * np.float32(math.sqrt(0.5))


def _triangle(x: Floats, y: Floats) -> Floats:
    low = y - np.float32(0.80)
    side = np.float32(math.sqrt(3) / 2) * np.abs(x) - np.float32(0.5) * y - np.float32(0.55)
    distance: Floats = np.maximum(low, side)
    return distance


def _cross(x: Floats, y: Floats) -> Floats:
    wide, thin = np.float32(1.0), np.float32(0.36)
    lying = np.maximum(np.abs(x) - wide, np.abs(y) - thin)
    standing = np.maximum(np.abs(x) - thin, np.abs(y) - wide)
    return np.minimum(lying, standing)


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(np.hypot(x, y) - np.float32(0.76)) - np.float32(0.24)


_DISTANCE: dict[Shape, Callable[[Floats, Floats], Floats]] = {
    Shape.CIRCLE: _circle,
    Shape.SQUARE: _square,
    Shape.TRIANGLE: _triangle,
    Shape.DIAMOND: _diamond,
    Shape.CROSS: _cross,
    Shape.RING: _ring,
}


def signed_distance(shape: Shape, x: Floats, y: Floats) -> Floats:
    """Signed distance to the outline of unit `radius`, negative inside; `x` to the right, `y` downwards."""
    return _DISTANCE[shape](x, y)


def _paint(image_HWC: Floats, thing: Object) -> None:
    height, width, _ = image_HWC.shape
    radius_px = thing.radius * min(height, width)
    x_px, y_px, reach = thing.x * width, thing.y * height, 1.25 * radius_px + 2
    top, bottom = max(0, int(y_px - reach)), min(height, int(y_px + reach) + 1)
    left, right = max(0, int(x_px - reach)), min(width, int(x_px + reach) + 1)
    if top >= bottom or left >= right:
        return
    ys = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - y_px) / radius_px)[:, None]
    xs = ((np.arange(left, right, dtype=np.float32) + 0.5 - x_px) / radius_px)[None, :]
    distance_px = signed_distance(thing.shape, *np.broadcast_arrays(xs, ys)) * radius_px
    cover_HW1: Floats = np.clip(0.5 - distance_px, 0.0, 1.0)[..., None].astype(np.float32)
    window = image_HWC[top:bottom, left:right]
    window += cover_HW1 * (np.asarray(RGB[thing.colour], dtype=np.float32) - window)


def ground_HWC(scene: Scene, height: int, width: int) -> Floats:
    """The ground alone, (H, W, 3): the named colour plus a brightness ramp of `slope` from side to side."""
    ys = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5)[:, None]
    xs = ((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5)[None, :]
    ramp_HW = np.float32(scene.slope) * (
        xs * np.float32(math.cos(scene.angle)) + ys * np.float32(math.sin(scene.angle))
    )
    base = np.asarray(RGB[scene.ground], dtype=np.float32)
    return np.clip(base + ramp_HW[..., None], 0.0, 1.0).astype(np.float32)


def render(scene: Scene, height: int, width: int) -> Floats:
    """The picture, (H, W, 3) float32 in 0..1."""
    image_HWC = ground_HWC(scene, height, width)
    for thing in scene.objects:
        _paint(image_HWC, thing)
    return image_HWC
