"""Calling the command line in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distri.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """The one JSON object on standard output."""
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The one line of an error; nothing else may have been said."""
        assert self.out == ""
        assert self.err.startswith("distri: error: ")
        assert self.err.count("\n") == 1
        return self.err.removeprefix("distri: error: ").rstrip("\n")


Distri = Callable[..., Outcome]


@pytest.fixture
def distri(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Distri:
    """Run `distri` with arguments, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


def left_behind(directory: Path) -> list[str]:
    """Names of all files below a directory, hidden ones too."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
