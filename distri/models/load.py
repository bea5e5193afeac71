"""Load a pipeline from the shipped checkpoint, a directory or the hub: safetensors only, no remote code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from distri.core.graph import LayerGraph
from distri.errors import ModelError
from distri.models.demo import checkpoint_path
from distri.models.unet import capture_unet

LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    AttributeError,
    ImportError,
    SafetensorError,
)
"""What the loaders of diffusers, transformers and safetensors raise for files that are missing or corrupt."""

HUB_MODELS = {
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b")
}
"""Presets that the hub holds: repository and the revision that distri was made for."""


def load_pipeline(name: str, dtype: str = "float32") -> Any:
    """A diffusers pipeline on the CPU, with its progress bar off.

    `name` is `demo`, `sdxl` or a directory that holds a diffusers pipeline.

    Raises:
        ModelError: it is not there, is corrupt, or would need pickled weights.
    """
    source, revision = _source_of(name)
    if revision is None:
        _refuse_pickles(Path(source))
    try:
        with quiet_loaders():
            pipe = DiffusionPipeline.from_pretrained(
                source,
                revision=revision,
                torch_dtype=getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=revision is None,
                trust_remote_code=False,
            )
    except LOAD_ERRORS as error:
        raise ModelError(f"{name}: cannot be loaded: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def quiet_loaders() -> Iterator[None]:
    """Without the loaders' progress bars, notices, and the warning about a keyword that older diffusers need."""
    loggers = (diffusers_logging, transformers_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
            if bars:
                logger.enable_progress_bar()


def _source_of(name: str) -> tuple[str, str | None]:
    if name == "demo":
        return str(checkpoint_path()), None
    if name in HUB_MODELS:
        return HUB_MODELS[name]
    if not (Path(name) / "model_index.json").is_file():
        raise ModelError(f"{name}: neither a preset (demo, sdxl) nor a directory with a model_index.json")
    return name, None


def _refuse_pickles(directory: Path) -> None:
    for part in sorted(item for item in directory.iterdir() if item.is_dir()):
        names = [file.name for file in part.iterdir()]
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        if pickled and not any(name.endswith(".safetensors") for name in names):
            raise ModelError(
                f"{part / pickled[0]}: pickled weights are not loaded; convert them to safetensors"
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def graph_of(model: nn.Module, name: str, vae_factor: int = 8) -> LayerGraph:
    """The layer graph of a loaded denoiser, captured from its config.

    Raises:
        ModelError: the denoiser is of a kind that distri cannot split.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no config to capture a layer graph from")
    return capture_unet(name, {"_class_name": type(model).__name__, **dict(config)}, vae_factor=vae_factor)
