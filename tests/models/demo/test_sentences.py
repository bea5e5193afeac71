"""Laws of the small language: what is said is what is meant."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distri.models.demo.layouts import (
    PLAIN_GROUND,
    Arrangement,
    Item,
    Layout,
    Place,
    Size,
    nominal_scene,
    sample_layout,
    sample_scene,
)
from distri.models.demo.scenes import Colour, Shape
from distri.models.demo.sentences import SentenceError, is_held_out, parse, sample_sentence, say, vocabulary

_seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=300)
@given(_seeds)
def test_every_wording_parses_back_to_its_layout(rng: np.random.Generator) -> None:
    layout = sample_layout(rng)
    assert parse(say(layout, rng)) == layout


@settings(max_examples=300)
@given(_seeds)
def test_every_word_said_is_in_the_vocabulary(rng: np.random.Generator) -> None:
    sentence = say(sample_layout(rng), rng)
    assert set(sentence.replace(",", " ,").split()) <= set(vocabulary())


@settings(max_examples=100)
@given(_seeds, st.booleans())
def test_a_sentence_is_on_the_side_of_the_split_it_was_asked_from(
    rng: np.random.Generator, held_out: bool
) -> None:
    sentence, layout = sample_sentence(rng, held_out=held_out)
    assert is_held_out(layout) == is_held_out(parse(sentence)) == held_out


@settings(max_examples=200)
@given(_seeds)
def test_things_of_a_layout_keep_apart_and_inside(rng: np.random.Generator) -> None:
    layout = sample_layout(rng)
    things = sample_scene(layout, rng).objects
    assert len(things) == layout.num_things
    for index, one in enumerate(things):
        assert one.colour is not layout.ground
        assert 0 < one.x - one.radius < one.x + one.radius < 1
        assert 0 < one.y - one.radius < one.y + one.radius < 1
        for two in things[:index]:
            assert max(abs(one.x - two.x), abs(one.y - two.y)) > one.radius + two.radius


def test_about_one_layout_in_ten_is_held_out() -> None:
    rng = np.random.default_rng(0)
    assert 0.08 < np.mean([is_held_out(sample_layout(rng)) for _ in range(3000)]) < 0.125


def test_a_sentence_reads_as_one_would_expect() -> None:
    layout = parse("a red circle above a small blue square on a green ground")
    assert layout == Layout(
        (Item(Colour.RED, Shape.CIRCLE), Item(Colour.BLUE, Shape.SQUARE, Size.SMALL)),
        Arrangement.ABOVE,
        (),
        Colour.GREEN,
    )
    circle, square = nominal_scene(layout).objects
    assert circle.y < square.y
    assert circle.x == square.x


def test_a_lone_thing_stands_in_the_centre_of_a_grey_ground() -> None:
    layout = parse("a picture of an orange ring")
    assert (layout.places, layout.ground) == ((Place.CENTRE,), PLAIN_GROUND)


@pytest.mark.parametrize(("count", "places"), [("two", 2), ("three", 3)])
def test_a_count_gives_that_many_things(count: str, places: int) -> None:
    assert len(nominal_scene(parse(f"{count} yellow triangles")).objects) == places


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a mauve circle", "a mauve circle"),
        ("hello", "hello"),
        ("a red circle on a mauve ground", "mauve"),
        ("a red circle and a blue ring at the top", "every thing"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, part: str) -> None:
    with pytest.raises(SentenceError, match=part):
        parse(text)
