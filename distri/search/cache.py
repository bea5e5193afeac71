"""Answers kept between calls, under the hash of all that they depend on: the same question is answered at once.

A key covers the request, the bytes of the model's graph and of the hardware file (and of what it extends), and the size
and time of every file of distri that takes part in an answer; so nothing stale is ever read, in a checkout either. This
file imports neither numpy nor pydantic: a warm answer costs a few file reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from distri import __version__
from distri.errors import HardwareError

_PACKAGE: Final = Path(__file__).parent.parent
_TAKING_PART: Final = ("core", "core/ops", "simulator", "simulator/data", "search", "search/data", "config")
MAX_KEPT: Final = 256


def cache_directory() -> Path:
    """Where answers are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "distri" / "plans"


def key_of(question: object, files: Iterable[Path]) -> str:
    """The key of a question about the contents of some files: 32 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps([__version__, question], sort_keys=True, default=str).encode())
    for path in files:
        digest.update(path.read_bytes())
    for folder in _TAKING_PART:
        with os.scandir(_PACKAGE / folder) as entries:
            for entry in sorted(entries, key=lambda found: found.name):
                if entry.is_file():
                    status = entry.stat()
                    digest.update(f"{folder}/{entry.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def hardware_files(name: str) -> tuple[Path, ...]:
    """The files that a hardware name or path stands for: its own, and those it extends.

    Raises:
        HardwareError: there is none, or it cannot be read.
    """
    shipped = _PACKAGE / "simulator" / "data" / "hardware"
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise HardwareError(f"{name}: there is no such hardware file")
        beside = sorted(p for p in path.parent.glob("*.y*ml") if p != path and _extends(path))
        return (path, *beside, *(sorted(shipped.glob("*.yaml")) if _extends(path) else ()))
    exact = shipped / f"{name.lower()}.yaml"
    if exact.is_file() and not _extends(exact):
        return (exact,)
    return tuple(sorted(shipped.glob("*.yaml")))


def _extends(path: Path) -> bool:
    try:
        return re.search(r"^extends:", path.read_text(encoding="utf-8"), re.MULTILINE) is not None
    except (OSError, UnicodeDecodeError) as error:
        raise HardwareError(f"{path}: cannot be read: {error}") from error


def recall(key: str) -> dict[str, Any] | None:
    """A kept answer; None if there is none, or it is damaged."""
    try:
        found = json.loads((cache_directory() / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "plan" in found and "search" in found else None


def remember(key: str, answer: dict[str, Any]) -> None:
    """Keep an answer; a cache that cannot be written only costs the time of the search again."""
    folder = cache_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{key}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(answer, file, separators=(",", ":"))
        Path(name).replace(folder / f"{key}.json")
        _forget_oldest(folder)
    except OSError:
        return


def _forget_oldest(folder: Path) -> None:
    kept = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in kept[:-MAX_KEPT]:
        path.unlink(missing_ok=True)
