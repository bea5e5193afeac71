"""Graphs by name: what ships is what a capture gives, and a directory's graph is captured once."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distri.core.graph import LayerGraph
from distri.errors import ModelError
from distri.models import presets
from distri.models.capture import Probe
from distri.models.make_graphs import capture_preset
from distri.models.presets import DATA, PRESETS, defaults, load_graph, read_graph
from distri.models.unet import capture_unet

SMALL = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    directory = tmp_path / "pipeline"
    (directory / "unet").mkdir(parents=True)
    (directory / "unet" / "config.json").write_text(json.dumps(SMALL))
    return directory


@pytest.mark.parametrize("name", PRESETS)
def test_the_shipped_graph_is_what_a_capture_gives_now(name: str) -> None:
    assert load_graph(name) == capture_preset(name)


def test_another_probe_captures_the_same_graph() -> None:
    config = json.loads((DATA / "sdxl-unet.json").read_text())
    other = Probe(batch=13, text=89, row_prime=43, col_prime=47, factor=4)
    assert capture_unet("sdxl", config, other) == load_graph("sdxl")


def test_presets_are_read_without_torch_or_diffusers() -> None:
    code = (
        "import sys; from distri.models.presets import load_graph; load_graph('sdxl'); "
        "sys.exit(bool({'torch', 'diffusers', 'networkx', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_directory_is_captured_once_and_then_remembered(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_graph(str(pipeline))
    assert first == dataclasses.replace(capture_unet("x", SMALL), name=str(pipeline))
    monkeypatch.setattr("distri.models.unet.capture_unet", _never)
    assert load_graph(str(pipeline)) == first


def _never(*_: Any) -> LayerGraph:
    raise AssertionError("captured again")


def test_a_directory_of_the_unet_alone_works_too(pipeline: Path) -> None:
    assert load_graph(str(pipeline / "unet")).operations == load_graph(str(pipeline)).operations


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 1, "operations": [{}]}', '{"schema": 99}'])
def test_a_damaged_cache_entry_is_made_again(pipeline: Path, damage: str) -> None:
    graph = load_graph(str(pipeline))
    (entry,) = presets.cache_directory().glob("*.graph.json")
    entry.write_text(damage)
    assert load_graph(str(pipeline)) == graph
    assert read_graph(entry).operations == graph.operations


def test_another_config_is_another_entry(pipeline: Path) -> None:
    load_graph(str(pipeline))
    (pipeline / "unet" / "config.json").write_text(json.dumps({**SMALL, "layers_per_block": 2}))
    load_graph(str(pipeline))
    assert len(list(presets.cache_directory().glob("*.graph.json"))) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load_graph(str(pipeline))) > 0


def test_the_vae_beside_the_unet_decides_the_pixels(pipeline: Path) -> None:
    assert defaults(str(pipeline)).side == 16 * 8
    (pipeline / "vae").mkdir()
    (pipeline / "vae" / "config.json").write_text('{"block_out_channels": [8, 8, 8]}')
    assert defaults(str(pipeline)).side == 16 * 4
    assert load_graph(str(pipeline)).vae_factor == 4


def test_an_unknown_model_is_refused_naming_the_presets() -> None:
    with pytest.raises(
        ModelError, match=r"unknown model 'sd9': neither a preset \(sdxl, demo\) nor a directory"
    ):
        load_graph("sd9")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON object is required"),
        (
            '{"_class_name": "FluxTransformer2DModel"}',
            "a UNet2DConditionModel is required, not FluxTransformer2DModel",
        ),
        (json.dumps({**SMALL, "norm_num_groups": 7}), "not a usable UNet config"),
    ],
)
def test_an_unusable_config_is_refused(pipeline: Path, text: str, sentence: str) -> None:
    (pipeline / "unet" / "config.json").write_text(text)
    with pytest.raises(ModelError, match=sentence):
        load_graph(str(pipeline))


def test_a_model_without_a_size_of_its_own_is_refused(pipeline: Path) -> None:
    config = {name: value for name, value in SMALL.items() if name != "sample_size"}
    (pipeline / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="its config has no sample_size"):
        defaults(str(pipeline))
