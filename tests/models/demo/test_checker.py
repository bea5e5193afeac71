"""The checker agrees with the truth on rendered scenes, and notices each kind of mistake."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distri.models.demo.checker import Report, check
from distri.models.demo.components import connected_components
from distri.models.demo.layouts import nominal_scene, sample_layout, sample_scene
from distri.models.demo.scenes import Colour, Object, Scene, Shape, render

_seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
_TRUTH = Scene(
    (Object(Shape.CIRCLE, Colour.RED, 0.5, 0.26, 0.12), Object(Shape.SQUARE, Colour.BLUE, 0.5, 0.74, 0.12)),
    Colour.GREEN,
)


def _drawn(scene: Scene, size: int = 160) -> Report:
    return check(render(scene, size, size), _TRUTH)


@settings(max_examples=40, deadline=None)
@given(_seeds, st.sampled_from([(128, 128), (256, 256), (192, 256)]))
def test_a_rendered_scene_obeys_its_layout(rng: np.random.Generator, size: tuple[int, int]) -> None:
    layout = sample_layout(rng)
    assert check(render(sample_scene(layout, rng), *size), nominal_scene(layout)).all_obeyed


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"colour": Colour.ORANGE}, "colour"),
        ({"shape": Shape.DIAMOND}, "shape"),
        ({"x": 0.26}, "position"),
        ({"radius": 0.185}, "size"),
    ],
)
def test_each_kind_of_mistake_is_noticed_alone(change: dict[str, object], wrong: str) -> None:
    first = replace(_TRUTH.objects[0], **change)  # type: ignore[arg-type]
    verdict = _drawn(replace(_TRUTH, objects=(first, _TRUTH.objects[1]))).verdicts[0]
    seen = {name: getattr(verdict, name) for name in ("colour", "shape", "position", "size")}
    assert seen == {name: name != wrong for name in seen}


def test_a_missing_thing_is_noticed() -> None:
    report = _drawn(replace(_TRUTH, objects=_TRUTH.objects[:1]))
    assert not report.count
    assert not report.words_obeyed


def test_swapped_things_are_noticed() -> None:
    one, two = _TRUTH.objects
    swapped = (replace(one, y=two.y), replace(two, y=one.y))
    assert not _drawn(replace(_TRUTH, objects=swapped)).words_obeyed


def test_the_wrong_ground_is_noticed() -> None:
    assert not _drawn(replace(_TRUTH, ground=Colour.WHITE)).ground


def test_noise_is_no_picture() -> None:
    assert not check(np.random.default_rng(0).random((96, 96, 3)), _TRUTH).words_obeyed


@settings(max_examples=50, deadline=None)
@given(_seeds)
def test_components_are_connected_and_apart(rng: np.random.Generator) -> None:
    mask_HW = rng.random((12, 15)) < 0.55
    labels_HW, count = connected_components(mask_HW)
    np.testing.assert_array_equal(labels_HW > 0, mask_HW)
    assert set(labels_HW[mask_HW]) == set(range(1, count + 1))
    for one, two in ((labels_HW[1:], labels_HW[:-1]), (labels_HW[:, 1:], labels_HW[:, :-1])):
        touching = (one > 0) & (two > 0)
        np.testing.assert_array_equal(one[touching], two[touching])


def test_a_ring_of_pixels_is_one_component() -> None:
    mask_HW = np.ones((5, 5), dtype=bool)
    mask_HW[2, 2] = False
    assert connected_components(mask_HW)[1] == 1
