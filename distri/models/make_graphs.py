"""Capture the presets' graphs again: `python -m distri.models.make_graphs`.

To be run when the capture, the graph's schema or a preset's config changes; a test holds the shipped files to it.
"""

from __future__ import annotations

import json
from pathlib import Path

from distri.core.graph import LayerGraph
from distri.models.demo import checkpoint_path
from distri.models.presets import DATA, PRESETS, data_path, write_graph
from distri.models.unet import capture_unet


def config_path(name: str) -> Path:
    """The UNet config that a preset's graph is captured from."""
    return checkpoint_path() / "unet" / "config.json" if name == "demo" else DATA / f"{name}-unet.json"


def capture_preset(name: str) -> LayerGraph:
    """The graph of a preset, captured now."""
    return capture_unet(name, json.loads(config_path(name).read_text(encoding="utf-8")))


def main() -> None:
    """Write every preset's graph."""
    for name in PRESETS:
        graph = capture_preset(name)
        write_graph(graph, data_path(name))
        print(f"{name}: {len(graph)} operations, fingerprint {graph.fingerprint}")


if __name__ == "__main__":
    main()
