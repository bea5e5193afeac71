"""What a run leaves on disk: written whole or not at all, and known to be writable before anything is loaded."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distri.errors import OutputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def is_writer() -> bool:
    """Whether this process is the one that writes results: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def check_output(path: Path | None) -> None:
    """Hold that a picture can be written, before anything is loaded.

    Raises:
        OutputError: the directory does not exist or is not writable, or the path is a directory or no picture's.
    """
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name a file")
    if path.suffix.lower() not in PICTURES:
        raise OutputError(f"{path}: pictures are written as .png, .jpg or .webp")
    check_directory(path)


def check_directory(path: Path) -> None:
    """Hold that there is a directory for a file, and that it takes one.

    Raises:
        OutputError: it does not exist, or is not writable.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the directory {path.parent} is not writable")


def remove_unfinished(path: Path | None) -> None:
    """Remove what ranks that were killed while they wrote have left; all of them have ended."""
    if path is not None:
        for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*{path.suffix}"):
            unfinished.unlink(missing_ok=True)


def save(image: Image | None, path: Path | None, writer: bool = True) -> None:
    """Write a picture whole or not at all; nothing without one, or if this is not the writer.

    Raises:
        OutputError: the file system refuses.
    """
    if path is not None and image is not None and writer:
        write_whole(path, image.save)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file beside `path`, which takes its place when it is done.

    Raises:
        OutputError: the file system refuses.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def save_latent(latent_BCHW: Tensor, path: Path) -> None:
    """Write a latent, in float32, as safetensors."""
    from safetensors.torch import save_file

    save_file({"latent": latent_BCHW.float().contiguous()}, path)
