"""The shipped text-to-image checkpoint: a tiny SDXL-shaped model that draws coloured shapes from sentences.

Importing this package costs nothing: it holds a path. Training, evaluation and the scene generator are modules of their
own (`scenes`, `layouts`, `sentences`, `checker` need numpy only; `train` and `evaluate` need torch and diffusers).
"""

from pathlib import Path

__all__ = ["checkpoint_path"]


def checkpoint_path() -> Path:
    """Folder of the shipped checkpoint, in the layout `StableDiffusionXLPipeline.from_pretrained` reads."""
    return Path(__file__).parent / "checkpoint"
