"""Every error that distri raises on purpose: one tree, so that a caller can catch a part or the whole of it.

A `UserError` is somebody's input: it is answered with one line and exit status 2. A `RunError` is a run that could not
go on: exit status 1. Broken invariants of distri itself are assertions, not members of this tree.
"""

from __future__ import annotations


class DistriError(Exception):
    """The root of the tree."""


class UserError(DistriError, ValueError):
    """What was asked for cannot be done; the message says what was required, what arrived and what to do."""


class PartitionError(UserError):
    """The image does not split into the patches that were asked for."""


class PolicyError(UserError):
    """A policy table names what does not exist, or asks for a version that nobody has produced."""


class PlanError(UserError):
    """A plan is malformed, was edited, or belongs to another model or size."""


class HardwareError(UserError):
    """A hardware file is malformed or contradicts itself."""


class ProfileError(UserError):
    """A profile is malformed, or holds what no device measures."""


class ModelError(UserError):
    """A model is unknown, unreadable or of a kind that distri cannot split."""


class OutputError(UserError):
    """A result cannot be written where it was asked for."""


class CheckpointError(UserError):
    """A checkpoint cannot be used: it is missing, damaged, or of another run."""


class RunError(DistriError):
    """A run stopped; the message names the rank, step, layer and exchange as far as they are known."""


class StaleReadError(RunError):
    """A version other than the one that the staleness contract requires was about to be read."""


class ScheduleMismatchError(RunError):
    """The model's layers did not run in the order that the plan lists them."""
