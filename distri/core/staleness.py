"""The idea of the paper, with no tensor in sight: when is a value fresh enough?

Neighbouring denoising steps see almost the same input, so their activations are almost the same. Displaced patch
parallelism (DistriFusion, section 4) therefore lets every layer use its own patch of *this* step beside the other
patches of the *previous* step: the values it needs were sent a whole step ago, and the sending hid behind computation.

The contract, for step t counted from 0. A rank always sees its own value of version t. Of every other rank it sees

    policy       during warm-up    afterwards
    fresh        t                 t
    stale        -                 exactly t - 1
    corrected    -                 exactly t - 1 (GroupNorm, see `distri.core.ops.group_norm`)
    shifted      -                 exactly t - 1 (GroupNorm, beside this rank's own t - 1)
    extrapolated -                 exactly t - 1, t - 2 and t - 3, carried forward to t
    stale, with a reach: as stale for near patches; for far ones the last version sent, see `version_from`
    frozen       -                 the last warm-up step
    local        nothing           nothing

never an older version, never a mixture, never half a tensor. A late message is waited for, not skipped; so a run is a
function of its plan and its inputs, whatever the network does. (A local output still goes to the same patch's rank of
the other guidance branch, which has it in its own step t: both halves make one latent.)
"""

from __future__ import annotations

from distri.core.policy import Phase, Policy, Reach
from distri.errors import PolicyError, StaleReadError

EXTRAPOLATED_VERSIONS = 3
"""What `extrapolated` reads: the last version, and two more for the last two changes."""


def phase_of(step: int, warmup_steps: int) -> Phase:
    """The phase of a step: the first `warmup_steps` steps are warm-up.

    >>> [phase_of(step, 2).value for step in range(3)]
    ['warmup', 'warmup', 'steady']
    """
    return Phase.WARMUP if step < warmup_steps else Phase.STEADY


def required_version(policy: Policy, step: int, warmup_steps: int) -> int | None:
    """The version of every *other* rank's value that a layer reads at `step`; None if it reads none.

    Raises:
        PolicyError: the version lies before the first step.

    >>> [required_version(policy, 7, 5) for policy in (Policy.FRESH, Policy.STALE, Policy.FROZEN, Policy.LOCAL)]
    [7, 6, 4, None]
    """
    if policy is Policy.LOCAL:
        return None
    version = {
        Policy.FRESH: step,
        Policy.STALE: step - 1,
        Policy.CORRECTED: step - 1,
        Policy.SHIFTED: step - 1,
        Policy.EXTRAPOLATED: step - 1,
        Policy.FROZEN: warmup_steps - 1,
    }[policy]
    if version < 0:
        raise PolicyError(f"policy {policy.value!r} at step {step} asks for a version before the first step")
    return version


def readers_of(
    version: int, policies: tuple[Policy, Policy], warmup_steps: int, num_steps: int
) -> tuple[int, ...]:
    """The steps at which a value of this version is read by other ranks, given (warm-up, steady) policies.

    A value that nobody reads is not sent: `frozen` sends nothing after warm-up, and the last step of a displaced run
    publishes nothing.

    >>> readers_of(4, (Policy.FRESH, Policy.STALE), warmup_steps=5, num_steps=50)
    (4, 5)
    >>> readers_of(49, (Policy.FRESH, Policy.STALE), warmup_steps=5, num_steps=50)
    ()
    """
    warmup, steady = policies
    readers = []
    if version < num_steps and _reads(version, version, warmup, steady, warmup_steps):
        readers.append(version)
    if steady is Policy.FROZEN:
        if version == warmup_steps - 1:
            readers.extend(range(warmup_steps, num_steps))
    elif version + 1 < num_steps and _reads(version + 1, version, warmup, steady, warmup_steps):
        readers.append(version + 1)
    return tuple(readers)


def _reads(step: int, version: int, warmup: Policy, steady: Policy, warmup_steps: int) -> bool:
    policy = warmup if phase_of(step, warmup_steps) is Phase.WARMUP else steady
    return required_version(policy, step, warmup_steps) == version


def version_from(reach: Reach | None, distance: int, version: int, warmup_steps: int) -> int:
    """The version that a reader has of a context whose owner is `distance` places away, where `version` is required.

    Without a reach, or near enough, that is `version` itself; farther away, the last version that was sent so far:
    those of warm-up, and every `reach.every`-th after the last of these.

    >>> [version_from(Reach(near=1, every=3), 2, version, warmup_steps=2) for version in range(9)]
    [0, 1, 1, 1, 4, 4, 4, 7, 7]
    """
    if reach is None or distance <= reach.near or version < warmup_steps:
        return version
    return version - (version - (warmup_steps - 1)) % reach.every


def check_version(layer: str, required: int, arrived: int) -> None:
    """Hold the contract at the moment of reading.

    Raises:
        StaleReadError: another version than the required one is at hand.
    """
    if arrived != required:
        raise StaleReadError(f"{layer}: version {required} is required, version {arrived} is at hand")
