"""What a sentence fixes: which things stand where. A `Layout` is the meaning of a sentence and the plan of a scene.

Invariant: a layout's things never overlap and never share the ground's colour, and each stands within a small jitter of
its nominal place, so the same layout drawn twice gives different pictures with the same meaning.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from distri.models.demo.scenes import Colour, Object, Scene, Shape, Word

PLAIN_GROUND = Colour.GREY
"""The ground of a sentence that names none. Things are never grey."""

THING_COLOURS = tuple(colour for colour in Colour if colour is not PLAIN_GROUND)
JITTER = 0.02
"""Largest shift of a thing from its nominal place, as a fraction of the picture."""


class Size(Word):
    """How large a thing is; a plain thing has no word for it."""

    SMALL = "small"
    PLAIN = ""
    LARGE = "large"


RADIUS = {Size.SMALL: 0.08, Size.PLAIN: 0.12, Size.LARGE: 0.185}


class Place(Word):
    """Where a lone thing stands, by the words for it."""

    CENTRE = "in the center"
    TOP = "at the top"
    BOTTOM = "at the bottom"
    LEFT = "on the left"
    RIGHT = "on the right"
    TOP_LEFT = "in the top left corner"
    TOP_RIGHT = "in the top right corner"
    BOTTOM_LEFT = "in the bottom left corner"
    BOTTOM_RIGHT = "in the bottom right corner"


class Arrangement(Word):
    """How the items stand to one another."""

    ROW = "row"
    COLUMN = "column"
    BETWEEN = "between"
    ABOVE = "above"
    BELOW = "below"
    LEFT_OF = "left of"
    RIGHT_OF = "right of"
    PLACED = "placed"


RELATIONS = (Arrangement.ABOVE, Arrangement.BELOW, Arrangement.LEFT_OF, Arrangement.RIGHT_OF)
_LOW, _MIDDLE, _HIGH = 0.26, 0.5, 0.74
_PLACE_XY = {
    Place.CENTRE: (_MIDDLE, _MIDDLE),
    Place.TOP: (_MIDDLE, _LOW),
    Place.BOTTOM: (_MIDDLE, _HIGH),
    Place.LEFT: (_LOW, _MIDDLE),
    Place.RIGHT: (_HIGH, _MIDDLE),
    Place.TOP_LEFT: (_LOW, _LOW),
    Place.TOP_RIGHT: (_HIGH, _LOW),
    Place.BOTTOM_LEFT: (_LOW, _HIGH),
    Place.BOTTOM_RIGHT: (_HIGH, _HIGH),
}
_SPREAD = {1: (0.5,), 2: (_LOW, _HIGH), 3: (0.18, 0.5, 0.82)}


@dataclass(frozen=True)
class Item:
    """One noun phrase: `count` equal things."""

    colour: Colour
    shape: Shape
    size: Size = Size.PLAIN
    count: int = 1


@dataclass(frozen=True)
class Layout:
    """Items and how they stand; `places` has one entry per item when the arrangement is `PLACED`, none otherwise."""

    items: tuple[Item, ...]
    arrangement: Arrangement = Arrangement.ROW
    places: tuple[Place, ...] = ()
    ground: Colour = PLAIN_GROUND

    @property
    def num_things(self) -> int:
        """How many shapes the picture shows."""
        return sum(item.count for item in self.items)


def _centres(layout: Layout) -> list[tuple[Item, float, float]]:
    things = [item for item in layout.items for _ in range(item.count)]
    line = _SPREAD[len(things)]
    match layout.arrangement:
        case Arrangement.PLACED:
            return [
                (item, *_PLACE_XY[place]) for item, place in zip(layout.items, layout.places, strict=True)
            ]
        case Arrangement.ROW:
            return [(item, at, _MIDDLE) for item, at in zip(things, line, strict=True)]
        case Arrangement.COLUMN:
            return [(item, _MIDDLE, at) for item, at in zip(things, line, strict=True)]
        case Arrangement.BETWEEN:
            middle, left, right = layout.items
            return [(middle, line[1], _MIDDLE), (left, line[0], _MIDDLE), (right, line[2], _MIDDLE)]
        case relation:
            return _related(layout.items, relation)


def _related(items: tuple[Item, ...], relation: Arrangement) -> list[tuple[Item, float, float]]:
    along = _SPREAD[3] if len(items) == 3 else (_LOW, _HIGH)
    if relation in (Arrangement.BELOW, Arrangement.RIGHT_OF):
        along = tuple(reversed(along))
    upright = relation in (Arrangement.ABOVE, Arrangement.BELOW)
    placed = []
    for item, at in zip(items, along, strict=True):
        spread = _SPREAD[item.count]
        placed += [(item, across, at) if upright else (item, at, across) for across in spread]
    return placed


def nominal_scene(layout: Layout) -> Scene:
    """The layout's scene with no jitter, on a flat ground."""
    things = [Object(item.shape, item.colour, x, y, RADIUS[item.size]) for item, x, y in _centres(layout)]
    return Scene(objects=tuple(things), ground=layout.ground)


def sample_scene(layout: Layout, rng: np.random.Generator) -> Scene:
    """A scene of this layout: places and sizes jittered, the ground shaded in a random direction."""
    nominal = nominal_scene(layout)

    def moved(thing: Object) -> Object:
        dx, dy = rng.uniform(-JITTER, JITTER, size=2)
        return replace(thing, x=thing.x + dx, y=thing.y + dy, radius=thing.radius * rng.uniform(0.95, 1.05))

    slope, angle = float(rng.uniform(0.16, 0.24)), float(rng.uniform(0.0, 2 * math.pi))
    return Scene(tuple(moved(thing) for thing in nominal.objects), layout.ground, slope, angle)


def _sample_item(rng: np.random.Generator, ground: Colour, sizes: tuple[Size, ...], count: int = 1) -> Item:
    colours = [colour for colour in THING_COLOURS if colour is not ground]
    colour, shape = colours[rng.integers(len(colours))], list(Shape)[rng.integers(len(Shape))]
    return Item(colour, shape, sizes[rng.integers(len(sizes))], count)


_ANY_SIZE = (Size.SMALL, Size.PLAIN, Size.PLAIN, Size.LARGE)
_FITS_THREE = (Size.SMALL, Size.PLAIN, Size.PLAIN)
_FAR_APART = tuple(
    (one, two)
    for one, (x1, y1) in _PLACE_XY.items()
    for two, (x2, y2) in _PLACE_XY.items()
    if max(abs(x1 - x2), abs(y1 - y2)) > 0.4
)


def sample_layout(rng: np.random.Generator) -> Layout:
    """A random layout of one to three things."""
    grounds = (*Colour, PLAIN_GROUND, PLAIN_GROUND)
    ground = grounds[rng.integers(len(grounds))]
    kind = rng.choice(7, p=(0.20, 0.08, 0.28, 0.12, 0.08, 0.12, 0.12))
    if kind == 0:
        place = list(Place)[rng.integers(len(Place))]
        return Layout((_sample_item(rng, ground, _ANY_SIZE),), Arrangement.PLACED, (place,), ground)
    if kind == 1:
        count = int(rng.integers(2, 4))
        item = _sample_item(rng, ground, _ANY_SIZE if count == 2 else _FITS_THREE, count)
        return Layout((item,), (Arrangement.ROW, Arrangement.COLUMN)[rng.integers(2)], (), ground)
    relation = RELATIONS[rng.integers(4)]
    if kind == 2:
        return Layout(tuple(_sample_item(rng, ground, _ANY_SIZE) for _ in range(2)), relation, (), ground)
    if kind == 3:
        counts = ((1, 2), (2, 1))[rng.integers(2)]
        return Layout(tuple(_sample_item(rng, ground, _ANY_SIZE, n) for n in counts), relation, (), ground)
    if kind == 4:
        places = _FAR_APART[rng.integers(len(_FAR_APART))]
        items = tuple(_sample_item(rng, ground, _ANY_SIZE) for _ in range(2))
        return Layout(items, Arrangement.PLACED, places, ground)
    if kind == 5:
        num_items = int(rng.integers(2, 4))
        sizes = _ANY_SIZE if num_items == 2 else _FITS_THREE
        return Layout(
            tuple(_sample_item(rng, ground, sizes) for _ in range(num_items)), Arrangement.ROW, (), ground
        )
    items = tuple(_sample_item(rng, ground, _FITS_THREE) for _ in range(3))
    return Layout(items, Arrangement.BETWEEN if rng.integers(2) else relation, (), ground)
