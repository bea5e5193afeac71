"""Hardware files: from a name, an alias or a path to a `Cluster`, or a refusal by file, line and field.

Four passes over the marked values, each refusing what it can see: quantities (units, signs, plausibility,
sources), structure (pydantic: missing, unknown, of the wrong type), expansion (names, models, links),
connection (every rank reaches every other one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from distri.config.hardware_text import HardwareText, expand
from distri.config.marked_yaml import Location, Marked, parse_marked, read_marked
from distri.config.plausibility import NETWORK_KINDS, implausible_field, implausible_link
from distri.config.quantity import Dimension, dimension_of, is_in_bits, parse_quantity
from distri.errors import HardwareError
from distri.simulator.hardware import Cluster, LinkKind

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

FILE_VERSION: Final = 1
_MAX_CHAIN: Final = 4
_OWN: Final = ("name", "title", "aliases")
"""Keys that a file does not take over from the one it extends."""


@dataclass(frozen=True)
class HardwareEntry:
    """A shipped hardware file: its name, its aliases and where it lies."""

    name: str
    aliases: tuple[str, ...]
    path: Path


def list_hardware() -> tuple[HardwareEntry, ...]:
    """The shipped files, by name."""
    folder = resources.files("distri.simulator") / "data" / "hardware"
    paths = sorted(Path(str(item)) for item in folder.iterdir() if item.name.endswith(".yaml"))
    return tuple(HardwareEntry(path.stem, _aliases(path), path) for path in paths)


def load_cluster(name_or_path: str | Path, num_hosts: int | None = None) -> Cluster:
    """The cluster of a shipped name (`a100-sxm`), an alias, or a path to a YAML file.

    `num_hosts` asks for that many hosts in place of the file's own number. Raises `HardwareError`.
    """
    marked = _read_chain(_locate(str(name_or_path)), ())
    return _build(marked, num_hosts)


def parse_cluster(text: str, path: str = "hardware.yaml", num_hosts: int | None = None) -> Cluster:
    """The cluster of a YAML text; `path` is what its errors call it, and where `extends` looks."""
    return _build(_extended(parse_marked(text, path), Path(path), ()), num_hosts)


def _aliases(path: Path) -> tuple[str, ...]:
    match = re.search(r"^aliases: \[(.*)\]", path.read_text(encoding="utf-8"), re.MULTILINE)
    return tuple(alias.strip() for alias in match.group(1).split(",")) if match else ()


def _locate(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    entries = list_hardware()
    for entry in entries:
        if name.lower() in (entry.name, *entry.aliases):
            return entry.path
    known = ", ".join(entry.name for entry in entries)
    raise HardwareError(f"unknown hardware {name!r}; shipped are {known}, or give the path of a .yaml file")


def _read_chain(path: Path, chain: tuple[Path, ...]) -> Marked:
    return _extended(read_marked(path), path, chain)


def _extended(marked: Marked, path: Path, chain: tuple[Path, ...]) -> Marked:
    """The file over the one it extends: a top-level key replaces the other file's; sources are united."""
    if not isinstance(marked.value, dict):
        raise marked.error((), "a hardware file is a mapping of keys to values")
    name = marked.value.get("extends")
    if name is None:
        return marked
    if not isinstance(name, str) or Path(name).name != name:
        raise marked.error(("extends",), f"{name!r} is neither a shipped name nor a file in the same folder")
    if path in chain or len(chain) >= _MAX_CHAIN:
        raise marked.error(
            ("extends",), f"files extend each other in a circle or more than {_MAX_CHAIN} deep"
        )
    base_path = path.parent / name if name.endswith((".yaml", ".yml")) else _locate(name)
    base = _read_chain(base_path, (*chain, path))
    inherited = {key: value for key, value in base.value.items() if key not in (*_OWN, *marked.value)}
    lines = {at: line for at, line in base.lines.items() if at and at[0] in (*inherited, "sources")}
    value = {**inherited, **marked.value}
    own, theirs = marked.value.get("sources", {}), base.value.get("sources", {})
    if isinstance(own, dict) and isinstance(theirs, dict):
        value["sources"] = {**theirs, **own}
    return Marked(marked.path, value, {**lines, **marked.lines})


def _build(marked: Marked, num_hosts: int | None) -> Cluster:
    if marked.value.get("version") != FILE_VERSION:
        given = marked.value.get("version", "none")
        raise marked.error(
            ("version",), f"this distri reads version {FILE_VERSION} of hardware files; got {given}"
        )
    sources = marked.value.get("sources")
    _Quantities(marked, sources if isinstance(sources, dict) else {}).convert(marked.value, (), None, "")
    text = _validate(marked)
    if num_hosts is not None:
        text = replace(text, num_hosts=num_hosts)
    if text.num_hosts < 1:
        raise marked.error(("num_hosts",), f"{text.num_hosts} hosts were asked for; at least 1 is needed")
    _check_fits(text, marked)
    cluster = expand(text, marked)
    _check_connected(cluster, marked)
    return cluster


class _Quantities:
    """The first pass: text with units becomes SI numbers, in place; short sources become their citations."""

    def __init__(self, marked: Marked, sources: Mapping[str, Any]) -> None:
        self.marked = marked
        self.sources = sources

    def convert(self, value: Any, location: Location, dimension: Dimension | None, name: str) -> None:
        """Walk a collection; `name` is the nearest key that names a field, `dimension` what it measures."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                self.convert(item, (*location, index), dimension, name)
        if not isinstance(value, dict) or location == ("sources",):
            return
        for key, item in value.items():
            at = (*location, key)
            own = dimension_of(key)
            is_number = key == "value" or own is not None
            field = name if key == "value" or (own is None and dimension is not None) else key
            if isinstance(item, dict | list):
                self.convert(item, at, own or dimension, field)
            elif is_number and item is not None:
                value[key] = self._number(item, at, own or dimension, field)
            elif key in ("source", "fits_source"):
                value[key] = self._source(item, at)
        if isinstance(kind := value.get("kind"), str):
            self._check_link(kind, value.get("bandwidth_bytes_per_s"), location)

    def _number(self, item: Any, at: Location, dimension: Dimension | None, field: str) -> float:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise self.marked.error(at, f"{item!r} is not a number")
        if isinstance(item, str) and is_in_bits(item) and not self._is_network(at):
            raise self.marked.error(
                at, f"{item!r} is in bits per second, which is how networks are quoted; use GB/s"
            )
        try:
            number = parse_quantity(item, dimension) if isinstance(item, str) else float(item)
        except ValueError as error:
            raise self.marked.error(at, str(error)) from error
        if number != number or abs(number) == float("inf"):
            raise self.marked.error(at, f"{item!r} is not a finite number")
        if problem := implausible_field(field, number):
            raise self.marked.error(at, problem)
        return number

    def _is_network(self, at: Location) -> bool:
        """Whether the link that a location lies in is of a kind that is quoted in bits."""
        value = self.marked.value
        for part in at:
            if isinstance(value, dict) and value.get("kind") in NETWORK_KINDS:
                return True
            value = value[part]
        return False

    def _check_link(self, kind: str, figure: Any, location: Location) -> None:
        bandwidth = figure.get("value") if isinstance(figure, dict) else None
        if kind not in list(LinkKind) or not isinstance(bandwidth, float):
            return
        at = (*location, "bandwidth_bytes_per_s", "value")
        if problem := implausible_link(LinkKind(kind), bandwidth):
            raise self.marked.error(at, problem)

    def _source(self, item: Any, at: Location) -> str:
        if not isinstance(item, str) or not item.strip():
            raise self.marked.error(at, "a source is a short name listed under 'sources', or a citation")
        if item not in self.sources and " " not in item.strip():
            raise self.marked.error(at, f"the source {item!r} is not listed under 'sources'")
        return str(self.sources.get(item, item))


@cache
def _adapter() -> TypeAdapter[HardwareText]:
    from pydantic import TypeAdapter

    return TypeAdapter(HardwareText)


def _validate(marked: Marked) -> HardwareText:
    from pydantic import ValidationError

    try:
        return _adapter().validate_python(marked.value)
    except ValidationError as error:
        raise _translated(error, marked) from error


def _translated(error: ValidationError, marked: Marked) -> HardwareError:
    """Pydantic's first finding as one sentence."""
    first = error.errors(include_url=False)[0]
    location: Location = first["loc"]
    match first["type"]:
        case "missing":
            return marked.error(location, "the field is missing")
        case "extra_forbidden" | "unexpected_keyword_argument":
            return marked.error(location, "unknown key")
        case "dataclass_type" | "dataclass_exact_type":
            return marked.error(
                location, f"a mapping of keys to values is required here; got {first['input']!r:.60}"
            )
        case "enum":
            expected = first.get("ctx", {}).get("expected", "one of the listed words")
            return marked.error(location, f"{first['input']!r} is none of {expected}")
    return marked.error(location, f"{first['msg'].lower()}; got {first['input']!r:.60}")


def _check_fits(text: HardwareText, marked: Marked) -> None:
    seen = set()
    for index, fit in enumerate(text.collectives.fits):
        at: Location = ("collectives", "fits", index)
        key = (fit.collective, fit.num_ranks)
        if key in seen:
            raise marked.error(at, f"{fit.collective} on {fit.num_ranks} ranks is fitted twice")
        seen.add(key)
        if fit.num_ranks < 2 or fit.bandwidth_bytes_per_s <= 0:
            raise marked.error(at, "a fit needs at least 2 ranks and a bandwidth above 0")
    if text.collectives.fits and not text.collectives.fits_source:
        raise marked.error(("collectives",), "fits_source is missing: fitted rows need their provenance")


def _check_connected(cluster: Cluster, marked: Marked) -> None:
    """Every rank reaches every other, over links and switches but not through another device."""
    from distri.simulator.topology import unreachable

    found = unreachable(cluster)
    if found is not None:
        first, second, what = found
        ranks = f"rank {second} ({cluster.devices[second].node})"
        where: Location = ("host", "links") if cluster.devices[second].host == 0 else ("network", "links")
        raise marked.error(where, f"{ranks} is disconnected from rank {first}: {what}")
