"""YAML with line numbers: plain values, and for every one of them the file and line that it was written on.

Built from libyaml's events, iteratively, so that a hostile file cannot exhaust the stack: size, depth and
number of values are bounded, anchors and aliases are refused (they multiply), and so are duplicate keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from distri.errors import HardwareError

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 16
MAX_VALUES: Final = 20_000

Location: TypeAlias = tuple[str | int, ...]
_INTEGER: Final = re.compile(r"[-+]?\d{1,18}")
_REAL: Final = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?")


@dataclass
class Marked:
    """A document's plain values, from `dict` to `bool` and None, and where each one stands."""

    path: str
    value: Any = None
    lines: dict[Location, tuple[str, int]] = field(default_factory=dict)

    def where(self, location: Location) -> tuple[str, int]:
        """File and line of a value, or of the nearest one around it."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, (self.path, 1))

    def error(self, location: Location, problem: str) -> HardwareError:
        """The refusal of a value: file, line, field, and one sentence."""
        path, line = self.where(location)
        return HardwareError(f"{path}, line {line}: {field_name(location)}: {problem}")


def field_name(location: Location) -> str:
    """A location as people write it.

    >>> field_name(("host", "links", 2, "latency_s"))
    'host.links[2].latency_s'
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".") or "the file"


def read_marked(path: Path) -> Marked:
    """Read and parse a file; `HardwareError` by file and line: too large, too deep, or not YAML."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise HardwareError(f"{path}: the file cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise HardwareError(
            f"{path}: the file is larger than {MAX_BYTES // 1024} KiB; hardware files are a few KiB"
        )
    return parse_marked(data, str(path))


def parse_marked(data: bytes | str, path: str) -> Marked:
    """Parse text into marked values; see `read_marked`."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    builder = _Builder(Marked(path))
    try:
        for event in yaml.parse(data, Loader=loader):
            builder.take(event)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        raise HardwareError(f"{path}, line {line}: the file is not valid YAML: {problem}") from error
    return builder.document


@dataclass
class _Open:
    """A collection that is being built: its container, its place, and the key that waits for a value."""

    container: dict[str, Any] | list[Any]
    location: Location
    key: str | None = None


class _Builder:
    """Turns events into values, one at a time, on a stack of its own."""

    def __init__(self, document: Marked) -> None:
        self.document = document
        self.stack: list[_Open] = []
        self.num_documents = 0

    def take(self, event: Any) -> None:
        name = type(event).__name__
        line = event.start_mark.line + 1
        match name:
            case "DocumentStartEvent":
                self.num_documents += 1
                if self.num_documents > 1:
                    raise HardwareError(
                        f"{self.document.path}, line {line}: a hardware file is one YAML document"
                    )
            case "MappingStartEvent" | "SequenceStartEvent":
                self._open({} if name == "MappingStartEvent" else [], event, line)
            case "MappingEndEvent" | "SequenceEndEvent":
                self.stack.pop()
            case "ScalarEvent":
                self._scalar(event, line)
            case "AliasEvent":
                raise HardwareError(
                    f"{self.document.path}, line {line}: anchors and aliases (& and *) are refused"
                )

    def _open(self, container: dict[str, Any] | list[Any], event: Any, line: int) -> None:
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.container, dict) and top.key is None:
            raise HardwareError(f"{self.document.path}, line {line}: a key must be a plain word")
        location = self._place(container, line)
        if len(self.stack) >= MAX_DEPTH:
            raise HardwareError(f"{self.document.path}, line {line}: nested deeper than {MAX_DEPTH} levels")
        self.stack.append(_Open(container, location))

    def _scalar(self, event: Any, line: int) -> None:
        top = self.stack[-1] if self.stack else None
        if top is None or not isinstance(top.container, dict) or top.key is not None:
            self._place(_plain(event.value) if event.implicit[0] else event.value, line)
            return
        if event.value in top.container:
            raise self.document.error(
                (*top.location, event.value), f"the key is given twice (again at line {line})"
            )
        top.key = event.value

    def _place(self, value: Any, line: int) -> Location:
        """Put a finished scalar or an opened collection where it belongs, and note its line."""
        location: Location = ()
        if self.stack:
            top = self.stack[-1]
            if isinstance(top.container, list):
                location = (*top.location, len(top.container))
                top.container.append(value)
            else:
                assert top.key is not None
                location = (*top.location, top.key)
                top.container[top.key] = value
                top.key = None
        else:
            self.document.value = value
        self.document.lines[location] = (self.document.path, line)
        if len(self.document.lines) > MAX_VALUES:
            raise HardwareError(
                f"{self.document.path}, line {line}: more than {MAX_VALUES} values in one file"
            )
        return location


def _plain(text: str) -> Any:
    """A plain scalar: an integer, a real with or without an exponent, a constant, or the text itself."""
    constants: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}
    if text in constants:
        return constants[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _REAL.fullmatch(text) else text
