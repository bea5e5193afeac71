"""What all ranks must agree on: who they are, and the values that rank 0 starts an image from.

Nothing is pickled: identities and structures travel as JSON, tensors as their bytes.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError

from distri.backends.torch_distributed.alarm import LostPeerError
from distri.errors import RunError

PLAIN = (type(None), bool, int, float, str)


def check_identities(store: Store, rank: int, size: int, identity: dict[str, str]) -> None:
    """Compare what every rank says of itself with what rank 0 says; all ranks come to the same result.

    `identity` has "who", which names the rank, and any number of entries that must be equal.

    Raises:
        LostPeerError: the first rank that did not come.
        RunError: the first rank that differs, and in which entry.
    """
    store.set(f"identity/{rank}", json.dumps(identity))
    first = _identity(store, 0, identity["who"])
    for other in range(1, size):
        theirs = _identity(store, other, identity["who"])
        for entry in first:
            if entry != "who" and theirs.get(entry) != first[entry]:
                raise RunError(
                    f"the ranks do not agree on the {entry}: {first['who']} has {first[entry]}, "
                    f"{theirs['who']} has {theirs.get(entry)}; start all ranks with the same"
                )


def _identity(store: Store, rank: int, who: str) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(store.get(f"identity/{rank}"))
    except DistStoreError as error:
        limit_s = store.timeout.total_seconds()  # type: ignore[attr-defined]
        sentence = f"{who}: lost rank {rank}: it did not come to the rendezvous within {limit_s:g} s"
        raise LostPeerError(sentence) from error
    return found


def encode(value: Any) -> tuple[str, list[Tensor]]:
    """JSON of a nested structure, and the tensors it refers to.

    Raises:
        RunError: a leaf is neither a tensor nor plain.
    """
    tensors: list[Tensor] = []
    return json.dumps(_encode(value, tensors)), tensors


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": [str(value.dtype).removeprefix("torch."), *value.shape]}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_encode(item, tensors) for item in value]}
    if type(value) is dict:
        if any(not isinstance(key, PLAIN) for key in value):
            raise RunError(
                f"rank 0 cannot send a dict with keys {sorted(map(repr, value))}: keys must be plain"
            )
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, PLAIN):
        return value
    raise RunError(
        f"rank 0 cannot send a {type(value).__name__}: only tensors, plain values, lists, tuples and dicts"
    )


def describe_tensors(text: str) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of each tensor that an encoded structure refers to, in order."""
    found: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            ((tag, body),) = node.items()
            if tag == "tensor":
                found.append((getattr(torch, body[0]), tuple(body[1:])))
            else:
                for item in body:
                    visit(item[1] if tag == "dict" else item)

    visit(json.loads(text))
    return found


def decode(text: str, tensors: list[Tensor]) -> Any:
    """The inverse of `encode`."""
    remaining = iter(tensors)

    def build(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        ((tag, body),) = node.items()
        if tag == "tensor":
            return next(remaining)
        if tag == "dict":
            return {key: build(item) for key, item in body}
        items = [build(item) for item in body]
        return tuple(items) if tag == "tuple" else items

    return build(json.loads(text))
