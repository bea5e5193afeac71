"""Does a picture show what its sentence asked for? Judged from pixels alone, with numpy.

The ground is fitted by a plane of colour, everything far from it is foreground, and the connected parts of
the foreground are the things. A thing's colour is the palette entry nearest to its median; its outline, the
palette shape whose mask overlaps best once both fill the same box.

Legend: H, W picture height and width in pixels; images are (H, W, 3) in 0..1.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from distri.models.demo.components import connected_components
from distri.models.demo.scenes import RGB, Colour, Object, Scene, Shape, signed_distance

_FAR_FROM_GROUND = 0.17
_SHADE_OF_GROUND = 0.25  # no two colours of the palette are nearer to each other than 0.38
_SMALLEST_SHARE = 0.0012
_SURE_OVERLAP = 0.72
_NEAR = 0.11
_BOX = 48


@dataclass(frozen=True)
class Found:
    """One thing seen: centre in fractions of width and height, half its box in fractions of the shorter side."""

    colour: Colour
    shape: Shape | None
    x: float
    y: float
    reach: float


@dataclass(frozen=True)
class Verdict:
    """What became of one expected thing; `found` is None if nothing answers to it."""

    expected: Object
    found: Found | None
    colour: bool
    shape: bool
    position: bool
    size: bool


@dataclass(frozen=True)
class Report:
    """The picture's judgement, one verdict per expected thing."""

    verdicts: tuple[Verdict, ...]
    ground: bool
    count: bool

    @property
    def words_obeyed(self) -> bool:
        """The right number of things, each of the right colour and outline."""
        return self.count and all(verdict.colour and verdict.shape for verdict in self.verdicts)

    @property
    def all_obeyed(self) -> bool:
        """Words obeyed, and ground, places and sizes too."""
        return self.words_obeyed and self.ground and all(v.position and v.size for v in self.verdicts)


def nearest_colour(rgb: NDArray[np.floating]) -> Colour:
    """The palette entry nearest to `rgb` (3,)."""
    palette = np.asarray(list(RGB.values()))
    return list(RGB)[int(np.argmin(((palette - rgb) ** 2).sum(axis=1)))]


def fit_ground(image_HWC: NDArray[np.floating]) -> NDArray[np.floating]:
    """The plane of colour under the things, (H, W, 3): least squares, refitted on the pixels near the last fit."""
    height, width, _ = image_HWC.shape
    ys, xs = np.meshgrid(np.linspace(-0.5, 0.5, height), np.linspace(-0.5, 0.5, width), indexing="ij")
    basis_N3 = np.stack([np.ones(height * width), xs.ravel(), ys.ravel()], axis=1)
    pixels_N3 = image_HWC.reshape(-1, 3).astype(np.float64)
    plane_N3 = np.tile(np.median(pixels_N3, axis=0), (height * width, 1))
    for limit in (0.35, 0.25, _FAR_FROM_GROUND, 0.12):
        near = np.linalg.norm(pixels_N3 - plane_N3, axis=1) < limit
        if near.sum() < 16:
            break
        plane_N3 = basis_N3 @ np.linalg.lstsq(basis_N3[near], pixels_N3[near], rcond=None)[0]
    return plane_N3.reshape(image_HWC.shape)


def _mask_of(shape: Shape) -> NDArray[np.bool_]:
    fine = np.linspace(-1.4, 1.4, 281, dtype=np.float32)
    x, y = np.meshgrid(fine, fine)
    return _fill_box(signed_distance(shape, x, y) < 0)


def _fill_box(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    ys = np.linspace(rows[0], rows[-1], _BOX).round().astype(int)
    xs = np.linspace(columns[0], columns[-1], _BOX).round().astype(int)
    box: NDArray[np.bool_] = mask_HW[np.ix_(ys, xs)]
    return box


def nearest_shape(mask_HW: NDArray[np.bool_]) -> Shape | None:
    """The outline whose mask overlaps best with this one, box on box; None if none overlaps well."""
    height = np.ptp(np.flatnonzero(mask_HW.any(axis=1))) + 1
    width = np.ptp(np.flatnonzero(mask_HW.any(axis=0))) + 1
    if not 0.7 < height / width < 1.4:
        return None
    seen = _fill_box(mask_HW)
    overlaps = {}
    for shape in Shape:
        model = _mask_of(shape)
        overlaps[shape] = (seen & model).sum() / (seen | model).sum()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] > _SURE_OVERLAP else None


def find_things(image_HWC: NDArray[np.floating]) -> list[Found]:
    """Every thing in the picture that is larger than a speck and more than a shade of the ground."""
    height, width, _ = image_HWC.shape
    distance_HW = np.linalg.norm(image_HWC - fit_ground(image_HWC), axis=2)
    labels_HW, count = connected_components(distance_HW > _FAR_FROM_GROUND)
    things = []
    for label in range(1, count + 1):
        mask_HW = labels_HW == label
        if mask_HW.sum() < _SMALLEST_SHARE * min(height, width) ** 2:
            continue
        if np.median(distance_HW[mask_HW]) < _SHADE_OF_GROUND:
            continue
        ys, xs = np.nonzero(mask_HW)
        reach = max(np.ptp(ys), np.ptp(xs)) / 2 / min(height, width)
        sure_HW = mask_HW & (distance_HW > 0.6 * np.median(distance_HW[mask_HW]))
        colour = nearest_colour(np.median(image_HWC[sure_HW], axis=0))
        x, y = (xs.min() + xs.max() + 1) / 2 / width, (ys.min() + ys.max() + 1) / 2 / height
        things.append(Found(colour, nearest_shape(mask_HW), float(x), float(y), float(reach)))
    return things


def _judge(expected: Object, found: Found | None, reach: float) -> Verdict:
    if found is None:
        return Verdict(expected, None, colour=False, shape=False, position=False, size=False)
    near = max(abs(found.x - expected.x), abs(found.y - expected.y)) < _NEAR
    size = 0.75 < found.reach / reach < 1.33
    return Verdict(
        expected, found, found.colour is expected.colour, found.shape is expected.shape, near, size
    )


def _reach(thing: Object) -> float:
    wide = {Shape.SQUARE: 0.86, Shape.DIAMOND: 1.12, Shape.TRIANGLE: 1.1}
    return wide.get(thing.shape, 1.0) * thing.radius


def check(image_HWC: NDArray[np.floating], scene: Scene) -> Report:
    """Judge a picture against the scene it should show (jitter and ground ramp aside). Each thing found counts once."""
    found = find_things(image_HWC)
    padded: list[Found | None] = [*found, *[None] * max(0, len(scene.objects) - len(found))]

    def cost(order: tuple[int, ...]) -> float:
        pairs = [(thing, padded[i]) for thing, i in zip(scene.objects, order, strict=True)]
        return sum(2.0 if f is None else abs(f.x - t.x) + abs(f.y - t.y) for t, f in pairs)

    order = min(permutations(range(len(padded)), len(scene.objects)), key=cost) if len(padded) < 8 else None
    chosen = [None] * len(scene.objects) if order is None else [padded[i] for i in order]
    verdicts = tuple(_judge(t, f, _reach(t)) for t, f in zip(scene.objects, chosen, strict=True))
    height, width, _ = image_HWC.shape
    ground = nearest_colour(fit_ground(image_HWC)[height // 2, width // 2]) is scene.ground
    return Report(verdicts, ground, len(found) == len(scene.objects))
