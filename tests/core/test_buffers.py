import pytest
from hypothesis import given
from hypothesis import strategies as st

from distri.core.buffers import DEPTH, VersionedBuffer
from distri.errors import StaleReadError


@given(count=st.integers(1, 20))
def test_exactly_the_newest_versions_are_held(count: int) -> None:
    buffer = VersionedBuffer[int]()
    for version in range(count):
        buffer.put("layer", version, 10 * version)
    for version in range(count):
        assert buffer.holds("layer", version) == (version >= count - DEPTH)
    assert buffer.get("layer", count - 1) == 10 * (count - 1)


def test_a_missing_version_is_an_error_that_says_what_is_held() -> None:
    buffer = VersionedBuffer[str]()
    buffer.put("layer", 3, "a")
    buffer.put("layer", 4, "b")
    with pytest.raises(StaleReadError, match="layer: version 2 is required; held: 3, 4"):
        buffer.get("layer", 2)


def test_a_version_is_written_once() -> None:
    buffer = VersionedBuffer[str]()
    buffer.put("layer", 3, "a")
    with pytest.raises(StaleReadError, match="version 3 was written twice"):
        buffer.put("layer", 3, "b")


def test_versions_do_not_go_back() -> None:
    buffer = VersionedBuffer[str]()
    buffer.put("layer", 3, "a")
    with pytest.raises(StaleReadError, match="version 2 arrived after version 3"):
        buffer.put("layer", 2, "b")


def test_a_new_image_starts_with_nothing() -> None:
    buffer = VersionedBuffer[str]()
    buffer.put("layer", 3, "a")
    buffer.clear()
    assert not buffer.holds("layer", 3)
