import json
from pathlib import Path

import pytest

from distri.core.graph import LayerGraph
from distri.models.presets import load_graph
from tests.cli.conftest import Distri, left_behind


def test_the_table_has_totals(distri: Distri) -> None:
    outcome = distri("graph")
    assert outcome.status == 0
    for part in ("sdxl at 1024x1024", "2.57 G parameters", "39 halo, 46 moments, 70 context", "3.38 T"):
        assert part in outcome.out


def test_json_is_the_graph_with_numbers_and_totals(distri: Distri) -> None:
    value = distri("graph", "--model", "demo", "--height", 256, "--width", 512, "--json").value
    assert LayerGraph.from_dict(value) == load_graph("demo")
    assert value["totals"]["operations"] == len(value["operations"])
    assert value["operations"][-1]["output_shape"] == [1, 4, 32, 64]


@pytest.mark.parametrize("name", ["graph.json", "graph.dot"])
def test_the_name_of_the_file_decides_the_form(distri: Distri, tmp_path: Path, name: str) -> None:
    assert distri("graph", "--model", "demo", "-o", name).status == 0
    text = (tmp_path / name).read_text()
    if name.endswith("json"):
        assert json.loads(text)["name"] == "demo"
    else:
        assert text.startswith('digraph "demo" {')
    assert left_behind(tmp_path) == [name]


def test_dot_and_json_go_to_standard_output_if_asked(distri: Distri) -> None:
    assert distri("graph", "--model", "demo", "--format", "dot").out.startswith("digraph")
    assert distri("graph", "--model", "demo", "--format", "json").value["name"] == "demo"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("-o", "graph.txt"), "graph.txt: a graph is written as json or dot"),
        (("-o", "none/graph.dot"), "there is no directory none"),
        (("--format", "svg"), "'svg' is not one of 'table', 'json', 'dot'."),
        (("--height", 100), "a height of 100 pixels is not a positive multiple"),
        (("--model", "sd9"), "unknown model 'sd9'"),
    ],
)
def test_what_cannot_be_shown_is_one_line_and_status_two(
    distri: Distri, tmp_path: Path, flags: tuple[object, ...], sentence: str
) -> None:
    outcome = distri("graph", *flags)
    assert sentence in outcome.complaint
    assert outcome.status == 2
    assert left_behind(tmp_path) == []
