import pytest
from hypothesis import given
from hypothesis import strategies as st

from distri.core.mesh import Mesh
from distri.errors import PartitionError


@given(cfg=st.sampled_from([1, 2]), patch=st.integers(1, 16))
def test_every_place_of_the_mesh_has_one_rank(cfg: int, patch: int) -> None:
    mesh = Mesh(cfg, patch)
    places = [(mesh.branch_of(rank), mesh.patch_of(rank)) for rank in range(mesh.size)]
    assert len(set(places)) == mesh.size
    assert [mesh.rank_of(*place) for place in places] == list(range(mesh.size))
    for rank in range(mesh.size):
        assert rank in mesh.peers(rank)
        assert {mesh.branch_of(peer) for peer in mesh.peers(rank)} == {mesh.branch_of(rank)}


def test_impossible_meshes_are_refused() -> None:
    with pytest.raises(PartitionError, match="1 or 2 guidance branches, not 3"):
        Mesh(3, 1)
    with pytest.raises(PartitionError, match="at least 1 patch, not 0"):
        Mesh(1, 0)
