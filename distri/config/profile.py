"""Profiles on disk: what `distri profile` measured, as JSON, read back completely validated and bounded in size."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from distri.errors import ProfileError
from distri.simulator.measured import MeasuredOperation, MeasuredStep, Measurements

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from distri.core.plan import Plan
    from distri.simulator.costs import ComputeFactory

PROFILE_SCHEMA: Final = 1
MAX_PROFILE_BYTES: Final = 32 * 2**20
MAX_POINTS: Final = 100_000
LONGEST_S: Final = 3600.0


@dataclass(frozen=True)
class Profile:
    """One profile. num_threads: of each rank; num_beside: ranks of this host that computed at the same time."""

    schema_version: int
    model: str
    fingerprint: str
    device: str
    device_kind: str
    dtype: str
    num_threads: int
    num_beside: int
    created: str
    torch_version: str
    command: str
    operations: tuple[MeasuredOperation, ...]
    steps: tuple[MeasuredStep, ...]

    @property
    def measurements(self) -> Measurements:
        """What the simulator takes from it."""
        source = f"distri profile on {self.device}, {self.created}, torch {self.torch_version}"
        return Measurements(self.device, self.dtype, self.operations, self.steps, source)


def dump_profile(profile: Profile) -> str:
    """The JSON text of a profile: one point a line."""
    body = asdict(profile)
    points = {name: [json.dumps(item) for item in body.pop(name)] for name in ("operations", "steps")}
    head = json.dumps(body, indent=1)[:-2]
    lists = [f' "{name}": [\n  ' + ",\n  ".join(lines) + "\n ]" for name, lines in points.items()]
    return head + ",\n" + ",\n".join(lists) + "\n}\n"


def load_profile(path: Path) -> Profile:
    """Read and validate a profile.

    Raises:
        ProfileError: the file cannot be read, is no profile, or holds times that no device takes.
    """
    try:
        if path.stat().st_size > MAX_PROFILE_BYTES:
            raise ProfileError(f"{path}: larger than {MAX_PROFILE_BYTES} bytes, which no profile is")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: not a profile: it is not text") from error
    try:
        return parse_profile(text)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error


def parse_profile(text: str) -> Profile:
    """A profile from its JSON text.

    Raises:
        ProfileError: as `load_profile`.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"not a profile: {error}") from error
    if not isinstance(data, dict) or "schema_version" not in data:
        raise ProfileError("not a profile: a JSON object with a schema_version is required")
    if data["schema_version"] != PROFILE_SCHEMA:
        raise ProfileError(
            f"this distri reads profiles of schema {PROFILE_SCHEMA}; this one is of schema {data['schema_version']!r}"
        )
    for name in ("operations", "steps"):
        if isinstance(data.get(name), list) and len(data[name]) > MAX_POINTS:
            raise ProfileError(f"{len(data[name])} {name}; at most {MAX_POINTS} are read")
    profile = _validate(data)
    _check(profile)
    return profile


def _validate(data: dict[str, Any]) -> Profile:
    from pydantic import ValidationError

    try:
        return _adapter().validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the profile"
        raise ProfileError(f"not a profile: {place}: {first['msg']}") from error


def _adapter() -> TypeAdapter[Profile]:
    from pydantic import TypeAdapter

    return TypeAdapter(Profile)


def _check(profile: Profile) -> None:
    """Hold that every time is one that a device can take."""
    for number, point in enumerate(profile.operations):
        if not 0 < point.device_s < LONGEST_S or not 0 <= point.launch_s < LONGEST_S:
            raise ProfileError(f"operations.{number}: {point.device_s!r} s is no measured time")
        if min((size for shape in (*point.key.inputs, point.key.output) for size in shape), default=1) < 1:
            raise ProfileError(f"operations.{number}: a shape has a size below 1")
        if not point.key.output:
            raise ProfileError(f"operations.{number}: an output without dimensions")
    for number, step in enumerate(profile.steps):
        if not 0 < step.seconds < LONGEST_S or not 0 < step.parts_s < LONGEST_S or step.num_operations < 1:
            raise ProfileError(f"steps.{number}: {step.seconds!r} s is no measured time")


def measured_compute(path: Path, plan: Plan) -> ComputeFactory:
    """How the simulator gets its layer times from a profile, and from the analytic model where that has none.

    Raises:
        ProfileError: as `load_profile`; or it was taken of another model or in another dtype.
    """
    from distri.simulator.compute import AnalyticCompute
    from distri.simulator.measured import MeasuredOperations

    profile = load_profile(path)
    if profile.fingerprint != plan.model.fingerprint:
        raise ProfileError(
            f"{path}: a profile of {profile.model!r} ({profile.fingerprint}), not of {plan.model.name!r} "
            f"({plan.model.fingerprint}); profile that model"
        )
    if profile.dtype != plan.dtype:
        raise ProfileError(f"{path}: a profile in {profile.dtype}, the plan is in {plan.dtype}; use --dtype")
    return lambda device, launch: MeasuredOperations(profile.measurements, AnalyticCompute(device, launch))
