"""What runs on this machine taught: how much faster or slower it is than its hardware file or profile says.

One figure for each (hardware, model, dtype): predicted over measured time, as a geometric mean over the runs. Planning
takes it as the speed of every device, so that the next prediction is the measured time.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

SCHEMA: Final = 1
MOST_RUNS: Final = 4
"""Older runs count no more than this many together."""


@dataclass(frozen=True)
class Subject:
    """What a figure is about."""

    hardware: str
    fingerprint: str
    dtype: str

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.hardware} {self.fingerprint} {self.dtype}"


def data_directory() -> Path:
    """Where the user's own hardware file (`machine.yaml`), profile and lessons lie."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "distri"


def own_profile() -> Path | None:
    """The profile that the user keeps for this machine, if there is one."""
    path = data_directory() / "profile.json"
    return path if path.is_file() else None


def own_hardware() -> Path | None:
    """The hardware file that the user keeps for this machine, if there is one."""
    path = data_directory() / "machine.yaml"
    return path if path.is_file() else None


def speed_of(subject: Subject) -> float:
    """The speed that was learned; 1 where nothing was."""
    entry = _read().get(subject.key)
    speed = entry.get("speed") if isinstance(entry, dict) else None
    known = float(speed) if isinstance(speed, int | float) and 0.001 < speed <= 100 else 1.0
    return float(
        f"{known:.2g}"
    )  # what is within a percent or so is asked, and answered, as the same question


def learn(subject: Subject, predicted_s: float, measured_s: float) -> float:
    """Fold one run in, predicted with the speed so far; returns the speed from now on."""
    lessons = _read()
    entry = lessons.get(subject.key)
    count = min(MOST_RUNS, entry["runs"]) if isinstance(entry, dict) and "runs" in entry else 0
    before = speed_of(subject)
    found = before * predicted_s / measured_s
    speed = math.exp((count * math.log(before) + math.log(found)) / (count + 1))
    speed = min(100.0, max(0.001, round(speed, 4)))
    lessons[subject.key] = {"speed": speed, "runs": count + 1}
    path = data_directory() / "learned.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(
        json.dumps({"schema": SCHEMA, "lessons": lessons}, indent=1) + "\n", encoding="utf-8"
    )
    unfinished.replace(path)
    return speed


def _read() -> dict[str, Any]:
    try:
        data = json.loads((data_directory() / "learned.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_known = (
        isinstance(data, dict) and data.get("schema") == SCHEMA and isinstance(data.get("lessons"), dict)
    )
    return dict(data["lessons"]) if is_known else {}
