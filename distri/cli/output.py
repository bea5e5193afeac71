"""Results on standard output and in files: whole or not at all, and refused before any work starts."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from distri.errors import OutputError


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output; a number that JSON has not (the PSNR of equal pictures) is null."""
    click.echo(json.dumps({name: None if _is_infinite(item) else item for name, item in value.items()}))


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def check_text_output(path: Path | None) -> None:
    """Hold that a file can be written, by making its unfinished twin and removing it again.

    Raises:
        OutputError: it cannot, or the path is something else than a file.
    """
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is not a file; name one")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no directory {path.parent}")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    os.close(handle)
    Path(name).unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: the file system refuses.
    """
    target = path.resolve()
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(target)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
