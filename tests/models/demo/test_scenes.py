"""Laws of the scene renderer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distri.models.demo.scenes import RGB, Colour, Object, Scene, Shape, ground_HWC, render

_things = st.builds(
    Object,
    shape=st.sampled_from(Shape),
    colour=st.sampled_from(Colour),
    x=st.floats(0.2, 0.8),
    y=st.floats(0.2, 0.8),
    radius=st.floats(0.08, 0.18),
)
_scenes = st.builds(
    Scene,
    objects=st.lists(_things, min_size=1, max_size=3).map(tuple),
    ground=st.sampled_from(Colour),
    slope=st.floats(0, 0.24),
    angle=st.floats(0, 6.28),
)


@settings(max_examples=30, deadline=None)
@given(_scenes)
def test_a_picture_is_the_same_at_two_resolutions(scene: Scene) -> None:
    large = render(scene, 256, 256).reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(large - render(scene, 128, 128)).mean() < 0.004


@settings(max_examples=30, deadline=None)
@given(_scenes, st.integers(3, 90), st.integers(3, 90))
def test_a_picture_has_the_size_asked_for_and_stays_in_range(scene: Scene, height: int, width: int) -> None:
    image_HWC = render(scene, height, width)
    assert image_HWC.shape == (height, width, 3)
    assert image_HWC.dtype == np.float32
    assert image_HWC.min() >= 0
    assert image_HWC.max() <= 1


@pytest.mark.parametrize("shape", [shape for shape in Shape if shape is not Shape.RING])
def test_the_middle_of_a_thing_has_its_colour(shape: Shape) -> None:
    scene = Scene((Object(shape, Colour.RED, 0.5, 0.5, 0.2),), Colour.WHITE)
    np.testing.assert_allclose(render(scene, 65, 65)[32, 32], RGB[Colour.RED], atol=1e-6)


def test_the_middle_of_a_ring_shows_the_ground() -> None:
    scene = Scene((Object(Shape.RING, Colour.RED, 0.5, 0.5, 0.2),), Colour.WHITE)
    np.testing.assert_allclose(render(scene, 65, 65)[32, 32], RGB[Colour.WHITE], atol=1e-6)


def test_the_ground_rises_by_its_slope_along_its_angle() -> None:
    ground = ground_HWC(Scene((), Colour.GREY, slope=0.2, angle=0.0), 4, 200)
    assert ground[0, -1, 0] - ground[0, 0, 0] == pytest.approx(0.2, abs=0.002)
    assert np.ptp(ground[:, 10, 0]) < 1e-6


def test_a_thing_beyond_the_edge_is_cut_off() -> None:
    scene = Scene((Object(Shape.CIRCLE, Colour.RED, 3.0, 3.0, 0.2),), Colour.WHITE)
    np.testing.assert_array_equal(render(scene, 32, 32), ground_HWC(scene, 32, 32))
