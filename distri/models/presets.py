"""Layer graphs by name: presets ship as data, a directory's UNet is captured once and remembered.

Reading a preset or a remembered graph imports neither torch nor diffusers; only a capture does. A remembered graph is
kept under the hash of everything it depends on, so a changed config, distri or diffusers makes a new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distri.core.graph import GRAPH_SCHEMA, LayerGraph
from distri.errors import ModelError


@dataclass(frozen=True)
class Defaults:
    """What a model is run with unless something else is asked for; `side` is in pixels."""

    side: int
    num_inference_steps: int
    guidance_scale: float
    dtype: str


PRESETS = {"sdxl": Defaults(1024, 50, 5.0, "float16"), "demo": Defaults(512, 25, 3.0, "float32")}
"""The models that have a name."""

DATA = Path(__file__).parent / "data"
DEFAULT_VAE_FACTOR = 8


def load_graph(name: str) -> LayerGraph:
    """The layer graph of a preset, or of the UNet in a directory.

    Raises:
        ModelError: there is no such model, or it cannot be read or split.
    """
    if name in PRESETS:
        return read_graph(data_path(name))
    return _remembered(name, read_unet_config(name), vae_factor(Path(name)))


def defaults(name: str) -> Defaults:
    """What a preset, or the UNet in a directory, is run with unless something else is asked for.

    Raises:
        ModelError: there is no such model.
    """
    if name in PRESETS:
        return PRESETS[name]
    size = read_unet_config(name).get("sample_size")
    side = max(size) if isinstance(size, list) else size
    if not isinstance(side, int):
        raise ModelError(f"{name}: its config has no sample_size, so its image size is unknown")
    return dataclasses.replace(PRESETS["sdxl"], side=side * vae_factor(Path(name)))


def data_path(name: str) -> Path:
    """Where a preset's graph is shipped."""
    return DATA / f"{name}.graph.json"


def read_graph(path: Path) -> LayerGraph:
    """A graph from its JSON file.

    Raises:
        ModelError: the file cannot be read or holds no graph.
    """
    data = _read_json(path)
    return LayerGraph.from_dict(data)


def read_unet_config(name: str) -> dict[str, Any]:
    """The UNet's config in a pipeline's directory, or in a directory of the UNet alone.

    Raises:
        ModelError: the directory has none, or it is not a JSON object.
    """
    for path in (Path(name) / "unet" / "config.json", Path(name) / "config.json"):
        if path.is_file():
            return _read_json(path)
    presets = ", ".join(PRESETS)
    raise ModelError(
        f"unknown model {name!r}: neither a preset ({presets}) nor a directory with unet/config.json or config.json"
    )


def vae_factor(directory: Path) -> int:
    """Pixels for each latent row, from the VAE beside the UNet; 8 if there is none.

    Raises:
        ModelError: the VAE's config is not a JSON object with block_out_channels.
    """
    path = directory / "vae" / "config.json"
    if not path.is_file():
        return DEFAULT_VAE_FACTOR
    blocks = _read_json(path).get("block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        raise ModelError(f"{path}: block_out_channels is required")
    return int(2 ** (len(blocks) - 1))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: a JSON object is required")
    return data


def _remembered(name: str, config: dict[str, Any], factor: int) -> LayerGraph:
    path = cache_directory() / f"{_cache_key(config, factor)}.graph.json"
    if path.is_file():
        try:
            return dataclasses.replace(read_graph(path), name=name)
        except ModelError:
            pass  # damaged: captured again and overwritten below
    from distri.models.unet import capture_unet

    graph = capture_unet(name, config, vae_factor=factor)
    _remember(graph, path)
    return graph


def cache_directory() -> Path:
    """Where captured graphs are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "distri"


def _cache_key(config: dict[str, Any], factor: int) -> str:
    from importlib.metadata import version

    from distri import __version__

    depends = [GRAPH_SCHEMA, __version__, version("diffusers"), factor, config]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]


def _remember(graph: LayerGraph, path: Path) -> None:
    """Keep a graph for the next time; a cache that cannot be written only costs that time again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_graph(graph, path)
    except OSError:
        return


def write_graph(graph: LayerGraph, path: Path) -> None:
    """Write a graph's compact JSON, whole or not at all."""
    text = json.dumps(graph.to_dict(), separators=(",", ":")) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
