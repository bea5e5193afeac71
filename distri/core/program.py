"""The program of a step: the four kinds of instruction that every backend performs, in order.

    compute   run the operations [first, last) of the layer graph
    publish   hand this rank's value of one exchange over; its message leaves when its bucket's last value has come, or,
              if that can wait (`held_buckets`), when the next step begins
    await     have the other ranks' values of one exchange, of exactly one version
    gather    have every rank's output, or, where the latent stays on its patch, that of the guidance partner

Each exchange is published and awaited just before the operation that reads it; so the order below is the order in
which a real model's layers run, and a backend checks the one against the other at the first step.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

from distri.core.buffers import DEPTH
from distri.core.plan import Exchange, Plan
from distri.core.policy import ExchangeKind, Phase, Policy
from distri.core.staleness import phase_of, readers_of, required_version


class InstructionKind(str, Enum):
    """What to do."""

    COMPUTE = "compute"
    PUBLISH = "publish"
    AWAIT = "await"
    GATHER = "gather"


@dataclass(frozen=True)
class Instruction:
    """One instruction of one step. `exchange` is the place in `plan.exchanges`; `version` is what is sent or read."""

    kind: InstructionKind
    first: int = 0
    last: int = 0
    exchange: int = -1
    version: int = -1


def step_program(plan: Plan, step: int) -> tuple[Instruction, ...]:
    """The instructions of `step`, the same on every rank."""
    program: list[Instruction] = []
    cursor = 0
    for place, exchange in enumerate(plan.exchanges):
        if exchange.index > cursor:
            program.append(Instruction(InstructionKind.COMPUTE, cursor, exchange.index))
            cursor = exchange.index
        if exchange.kind is ExchangeKind.OUTPUT:
            program.append(Instruction(InstructionKind.GATHER, exchange=place, version=step))
            continue
        if is_published(plan, exchange, step):
            program.append(Instruction(InstructionKind.PUBLISH, exchange=place, version=step))
        version = awaited_version(plan, exchange, step)
        if version is not None:
            program.append(Instruction(InstructionKind.AWAIT, exchange=place, version=version))
    return tuple(program)


StepPattern = tuple[int, tuple[Instruction, ...], tuple[Instruction, ...]]


def step_patterns(plan: Plan) -> tuple[StepPattern, ...]:
    """Of each step, what a recording of it depends on: steps of one pattern can be replayed for each other.

    They perform the same instructions on versions at the same distance, these lie in the same slots, and the step
    before left the same messages to be sent.
    """
    programs = [
        _as_of_step_0(step_program(plan, step), step) for step in range(plan.image.num_inference_steps)
    ]
    return tuple(
        (step % DEPTH, program, programs[step - 1] if step else ()) for step, program in enumerate(programs)
    )


def _as_of_step_0(program: tuple[Instruction, ...], step: int) -> tuple[Instruction, ...]:
    """A step's program with versions counted from that step."""
    return tuple(
        i if i.kind is InstructionKind.COMPUTE else dataclasses.replace(i, version=i.version - step)
        for i in program
    )


def is_published(plan: Plan, exchange: Exchange, step: int, phase: Phase | None = None) -> bool:
    """Whether anybody will read the value that this step produces.

    `phase` is what a refresh made of the step; without one it follows from the plan's warm-up.
    """
    if phase is not None and exchange.policy(phase) is Policy.FRESH:
        return True
    policies = (exchange.warmup, exchange.steady)
    return bool(readers_of(step, policies, plan.warmup_steps, plan.image.num_inference_steps))


def awaited_version(plan: Plan, exchange: Exchange, step: int, phase: Phase | None = None) -> int | None:
    """The version of the other ranks' values that this step reads; None under `local`. `phase` as above."""
    policy = exchange.policy(phase or phase_of(step, plan.warmup_steps))
    return required_version(policy, step, plan.warmup_steps)


def held_buckets(plan: Plan) -> frozenset[int]:
    """The buckets that leave when the next step begins, not when they are full: those of a step's second half.

    The next step reads them half a step later at the earliest. The output, which everybody waits for, then finds no
    large message before it on its way.
    """
    middle = plan.exchanges[-1].index / 2
    firsts: dict[int, int] = {}
    for exchange in plan.exchanges:
        if exchange.bucket is not None:
            firsts.setdefault(exchange.bucket, exchange.index)
    return frozenset(bucket for bucket, index in firsts.items() if index >= middle)


def travels_in_bucket(plan: Plan, exchange: Exchange, step: int, phase: Phase | None = None) -> int | None:
    """The bucket that the value published at `step` travels in; None if it travels alone.

    A value that is read in its own step cannot wait for later layers: only values that are read one step later share
    a message. `phase` as above.
    """
    policy = exchange.policy(phase or phase_of(step, plan.warmup_steps))
    return None if policy is Policy.FRESH else exchange.bucket
