"""The small language of the demo model: a layout is said in several ways, and every one of them parses back to it.

Invariant: `parse(say(layout, rng)) == layout` for every layout that `sample_layout` draws. The held-out split depends
on the layout, not on its wording, so no wording of a held-out layout is ever trained on.
"""

import hashlib

import numpy as np

from distri.models.demo.layouts import (
    PLAIN_GROUND,
    RELATIONS,
    Arrangement,
    Item,
    Layout,
    Place,
    Size,
    sample_layout,
)
from distri.models.demo.scenes import Colour, Shape

_COUNT_WORDS = {2: "two", 3: "three"}
_RELATION_WORDS = {
    Arrangement.ABOVE: ("above", "over"),
    Arrangement.BELOW: ("below", "under"),
    Arrangement.LEFT_OF: ("left of", "to the left of"),
    Arrangement.RIGHT_OF: ("right of", "to the right of"),
}
_OPENINGS = ("", "", "a picture of")
_GROUND_WORDS = ("ground", "background")
_PLURAL = {shape: f"{shape}es" if shape is Shape.CROSS else f"{shape}s" for shape in Shape}


class SentenceError(ValueError):
    """The text is not a sentence of the demo model's language."""


def say_item(item: Item) -> str:
    """The noun phrase: "a small red circle", "two yellow triangles"."""
    words = [word for word in (item.size, item.colour) if word]
    if item.count > 1:
        return " ".join([_COUNT_WORDS[item.count], *words, _PLURAL[item.shape]])
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words, item.shape])


def _body(layout: Layout, rng: np.random.Generator) -> str:
    phrases = [say_item(item) for item in layout.items]
    match layout.arrangement:
        case Arrangement.PLACED:
            if layout.places == (Place.CENTRE,) and rng.integers(2):
                return phrases[0]
            return " and ".join(
                f"{phrase} {place}" for phrase, place in zip(phrases, layout.places, strict=True)
            )
        case Arrangement.ROW if len(phrases) == 1:
            return phrases[0] if rng.integers(2) else f"{phrases[0]} in a row"
        case Arrangement.COLUMN:
            return f"{phrases[0]} in a column"
        case Arrangement.ROW:
            return ", ".join(phrases[:-1]) + " and " + phrases[-1]
        case Arrangement.BETWEEN:
            return f"{phrases[0]} between {phrases[1]} and {phrases[2]}"
        case relation:
            words = _RELATION_WORDS[relation]
            word = words[0] if len(phrases) == 3 else words[rng.integers(2)]
            return f" {word} ".join(phrases)


def say(layout: Layout, rng: np.random.Generator) -> str:
    """One wording of the layout, drawn at random."""
    text = _body(layout, rng)
    opening = _OPENINGS[rng.integers(len(_OPENINGS))]
    if opening:
        text = f"{opening} {text}"
    if layout.ground is not PLAIN_GROUND or rng.integers(2):
        article = "an" if layout.ground[0] in "aeiou" else "a"
        text += f" on {article} {layout.ground} {_GROUND_WORDS[rng.integers(2)]}"
    return text


def vocabulary() -> tuple[str, ...]:
    """Every word of the language, sorted."""
    words = {"a", "an", "picture", "of", "on", "in", "and", "between", "row", "column", ",", *_GROUND_WORDS}
    words.update(_COUNT_WORDS.values(), Colour, Shape, _PLURAL.values(), (size for size in Size if size))
    for phrase in (*Place, *(word for ways in _RELATION_WORDS.values() for word in ways)):
        words.update(phrase.split())
    return tuple(sorted(str(word) for word in words))


def is_held_out(layout: Layout) -> bool:
    """Whether the layout is kept for evaluation: about one in ten, by a hash that no seed changes."""
    return hashlib.sha256(repr(_key(layout)).encode()).digest()[0] < 26


def _key(layout: Layout) -> tuple[object, ...]:
    items = tuple((str(i.colour), str(i.shape), str(i.size), i.count) for i in layout.items)
    return items, str(layout.arrangement), tuple(map(str, layout.places)), str(layout.ground)


def sample_sentence(rng: np.random.Generator, held_out: bool = False) -> tuple[str, Layout]:
    """A sentence and its layout, from the training side of the split or from the held-out side."""
    while True:
        layout = sample_layout(rng)
        if is_held_out(layout) == held_out:
            return say(layout, rng), layout


def parse(text: str) -> Layout:
    """The layout a sentence asks for. Raises `SentenceError` naming the first part it cannot read."""
    words = text.lower().replace(",", " , ").split()
    if words[:3] == ["a", "picture", "of"]:
        words = words[3:]
    words, ground = _take_ground(words)
    text = " ".join(words)
    for relation in RELATIONS:
        for phrase in reversed(_RELATION_WORDS[relation]):
            parts = text.split(f" {phrase} ")
            if len(parts) > 1:
                return Layout(tuple(map(_parse_item, parts)), relation, (), ground)
    return _parse_unrelated(text, ground)


def _take_ground(words: list[str]) -> tuple[list[str], Colour]:
    if len(words) > 4 and words[-1] in _GROUND_WORDS and words[-4] == "on":
        if words[-2] not in tuple(Colour):
            raise SentenceError(f"a ground has one of the colours {', '.join(Colour)}; got {words[-2]!r}")
        return words[:-4], Colour(words[-2])
    return words, PLAIN_GROUND


def _parse_unrelated(text: str, ground: Colour) -> Layout:
    if " between " in text:
        middle, sides = text.split(" between ", 1)
        items = tuple(map(_parse_item, [middle, *sides.split(" and ")]))
        return Layout(items, Arrangement.BETWEEN, (), ground)
    for tail, arrangement in ((" in a row", Arrangement.ROW), (" in a column", Arrangement.COLUMN)):
        if text.endswith(tail):
            return Layout((_parse_item(text.removesuffix(tail)),), arrangement, (), ground)
    parts = [part.strip() for part in text.replace(" and ", " , ").split(" , ")]
    placed = [_split_place(part) for part in parts]
    items = tuple(_parse_item(phrase) for phrase, _ in placed)
    places = tuple(place for _, place in placed if place is not None)
    if len(places) == len(items):
        return Layout(items, Arrangement.PLACED, places, ground)
    if places:
        raise SentenceError(f"either every thing of {text!r} has a place, or none has")
    if len(items) == 1 and items[0].count == 1:
        return Layout(items, Arrangement.PLACED, (Place.CENTRE,), ground)
    return Layout(items, Arrangement.ROW, (), ground)


def _split_place(part: str) -> tuple[str, Place | None]:
    for place in Place:
        if part.endswith(f" {place}"):
            return part.removesuffix(f" {place}"), place
    return part, None


def _parse_item(phrase: str) -> Item:
    words = phrase.split()
    counts = {"a": 1, "an": 1} | {word: number for number, word in _COUNT_WORDS.items()}
    shapes = {str(shape): shape for shape in Shape} | {word: shape for shape, word in _PLURAL.items()}
    if len(words) == 3:
        words.insert(1, Size.PLAIN)
    if (
        len(words) != 4
        or words[0] not in counts
        or words[1] not in tuple(Size)
        or words[2] not in tuple(Colour)
        or words[3] not in shapes
    ):
        raise SentenceError(
            f'a thing reads like "a small red circle" or "two yellow triangles"; got {phrase!r}. '
            f"Colours: {', '.join(Colour)}; shapes: {', '.join(Shape)}"
        )
    return Item(Colour(words[2]), shapes[words[3]], Size(words[1]), counts[words[0]])
