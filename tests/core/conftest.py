"""The shipped graphs, read once."""

import json
from pathlib import Path

import pytest

import distri
from distri.core.graph import LayerGraph

DATA = Path(distri.__file__).parent / "models" / "data"


@pytest.fixture(scope="session")
def sdxl() -> LayerGraph:
    return LayerGraph.from_dict(json.loads((DATA / "sdxl.graph.json").read_text()))


@pytest.fixture(scope="session")
def demo() -> LayerGraph:
    return LayerGraph.from_dict(json.loads((DATA / "demo.graph.json").read_text()))
