"""The mutation check: distri is broken on purpose, in one place at a time, and a law must fall each time."""

from __future__ import annotations

import importlib
from functools import reduce

import pytest

from distri.errors import DistriError
from distri.nn.conv2d import make_window
from tests.laws import LAWS
from tests.mutations import MUTATIONS, Mutation

FELL = (AssertionError, ArithmeticError, LookupError, RuntimeError, ValueError, DistriError)


def first_law_that_falls():
    """Its name and what it said; None if all hold."""
    for law in LAWS:
        make_window.cache_clear()
        try:
            law()
        except FELL as error:
            return law.__name__, f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def seed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in mutation.places:
        module, _, attribute = place.partition(":")
        *owners, name = attribute.split(".")
        owner = reduce(getattr, owners, importlib.import_module(module))
        monkeypatch.setattr(owner, name, mutation.broken(getattr(owner, name)))


def test_every_law_holds_where_nothing_is_broken():
    assert first_law_that_falls() is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_seeded_fault_is_caught(mutation, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        # Caches of sound results would hide the fault, and those of faulty ones would outlive it.
        make_window.cache_clear()
        patch.setattr("distri.nn.conv2d.make_window", make_window)
        seed(mutation, patch)
        found = first_law_that_falls()
    make_window.cache_clear()
    assert found is not None, f"nobody noticed: {mutation.name}"
    with capsys.disabled():
        law, words = found
        print(f"\n  {mutation.name:44} {law.replace('_', ' '):42} {words:.80}", end="")


def test_no_fault_is_listed_twice():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
