"""Policy tables of a user's own: YAML to `PolicyTable`, every rule validated, and refused by its line if it is wrong.

base: corrected            # the table that decides whatever no rule below decides
name: local middle         # how plans and tables call it; default: the base's name and a plus sign
rules:                     # the first that matches decides
  - {kind: context, phase: steady, policy: local, layers: "mid_block.*"}
  - {kind: halo, phase: steady, policy: stale, codec: residual_int4}
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from distri.config.marked_yaml import Location, Marked, read_marked
from distri.core.graph import LayerGraph
from distri.core.planner import to_jsonable
from distri.core.policy import ExchangeKind, Policy, PolicyRule, PolicyTable, builtin_tables, policy_table
from distri.errors import HardwareError, PolicyError

FIELDS = ("base", "name", "rules")
MAX_RULES = 1000


def load_policy_table(path: Path, base: str, graph: LayerGraph, is_base_asked: bool = False) -> PolicyTable:
    """Read a table; `base` is the one to build on where the file names none.

    Raises:
        PolicyError: the file cannot be read, is no policy table, contradicts itself, has a rule for layers that
            `graph` does not have, or builds on another table than `base` although `is_base_asked`.
    """
    try:
        document = read_marked(path)
    except HardwareError as error:  # the reader is shared with hardware files, and so is its tree of errors
        raise PolicyError(str(error)) from error
    body = document.value
    if not isinstance(body, dict):
        raise PolicyError(
            f"{path}: not a policy table: a mapping with rules is required, and base and name if wanted"
        )
    for key in body:
        if key not in FIELDS:
            raise _refusal(document, (key,), f"unknown field; known: {', '.join(FIELDS)}")
    rules = _rules(document)
    _check_layers(document, rules, graph)
    table = _base(document, base)
    if is_base_asked and table.name != policy_table(base).name:
        raise _refusal(document, ("base",), f"the file builds on {table.name}, but {base} was asked for")
    return _named(document, table.with_rules(rules))


def _base(document: Marked, base: str) -> PolicyTable:
    name = document.value.get("base", base)
    if not isinstance(name, str):
        raise _refusal(document, ("base",), "the name of a table is required")
    try:
        return policy_table(name)
    except PolicyError as error:
        raise _refusal(document, ("base",), str(error)) from error


def _rules(document: Marked) -> tuple[PolicyRule, ...]:
    listed = document.value.get("rules")
    if not isinstance(listed, list) or not listed:
        raise _refusal(document, ("rules",), "a list of at least one rule is required")
    if len(listed) > MAX_RULES:
        raise _refusal(document, ("rules",), f"{len(listed)} rules; at most {MAX_RULES} are read")
    return tuple(_rule(document, ("rules", place), item) for place, item in enumerate(listed))


def _rule(document: Marked, place: Location, item: Any) -> PolicyRule:
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(item, dict):
        raise _refusal(document, place, "a rule names kind, phase and policy")
    try:
        rule = TypeAdapter(PolicyRule).validate_python(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _refusal(
            document, (*place, *first["loc"]), first["msg"].removeprefix("Value error, ")
        ) from error
    if rule.kind is ExchangeKind.OUTPUT and rule.policy is Policy.LOCAL:
        raise _refusal(document, place, "where the latent lies is no rule's business; use --latent patch")
    unknown = _unknown(item, to_jsonable(rule))
    if unknown is not None:
        known = ", ".join(field.name for field in dataclasses.fields(PolicyRule))
        raise _refusal(document, (*place, *unknown), f"unknown field; a rule has {known}")
    return rule


def _unknown(item: dict[str, Any], known: dict[str, Any]) -> Location | None:
    """Where `item` has a key that became no part of a rule."""
    for key, value in item.items():
        if key not in known:
            return (key,)
        if isinstance(value, dict):
            inner = _unknown(value, known[key])
            if inner is not None:
                return (key, *inner)
    return None


def _check_layers(document: Marked, rules: tuple[PolicyRule, ...], graph: LayerGraph) -> None:
    """Hold that each rule is for some layer: one that is for none is a slip of the pen, not a wish."""
    for place, rule in enumerate(rules):
        layers = [operation.path for operation in graph.exchanging if operation.exchange is rule.kind]
        if rule.kind is not ExchangeKind.OUTPUT and not any(
            fnmatchcase(layer, rule.layers) for layer in layers
        ):
            example = f"; one that has is {layers[0]}" if layers else ""
            raise _refusal(
                document,
                ("rules", place),
                f"no layer of {graph.name} that matches {rule.layers!r} has a {rule.kind.value} exchange{example}",
            )


def _named(document: Marked, table: PolicyTable) -> PolicyTable:
    name = document.value.get("name", table.name)
    if not isinstance(name, str) or not name or not name.isprintable():
        raise _refusal(document, ("name",), "a line of text is required")
    if name in builtin_tables():
        raise _refusal(document, ("name",), f"{name!r} is the name of a built-in table; choose another")
    return dataclasses.replace(table, name=name)


def _refusal(document: Marked, location: Location, problem: str) -> PolicyError:
    return PolicyError(str(document.error(location, problem)))
