"""Steps of one rank that are recorded once and replayed: the part of a step between its arguments and its output.

Steps with the same pattern (`distri.core.program.step_patterns`) do the same things in the same places: in warm-up two
patterns take turns, in the steady phase two others, and a few steps stand alone, such as the last. Of each pattern the
first step is a rehearsal, done as ever, in which all that is allocated once is allocated; the second is recorded; all
others, of this image and of later ones, are replays. Step 0 is always done as ever: it makes what an image needs once.

Replays read and write where the recording did. So the arguments are copied to where they lay then, and what was made
from the text once an image is copied to where it lay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from distri.backends.base import Recorder, Recording, RecordingError
from distri.core.codec import Codec
from distri.core.plan import Exchange, Plan
from distri.core.policy import Policy
from distri.core.program import StepPattern, step_patterns
from distri.nn.rank_context import RankContext

R = TypeVar("R")


def is_recordable(plan: Plan) -> bool:
    """Whether a step of this plan does the same as the one before last: the host keeps nothing between steps.

    Codecs, extrapolation and resting context keep sums and versions on the host's side, `shifted` its own last
    moments; a refresh is decided during the run.
    """
    return plan.refresh is None and all(_keeps_nothing(exchange) for exchange in plan.exchanges)


def _keeps_nothing(exchange: Exchange) -> bool:
    keeping = (Policy.EXTRAPOLATED, Policy.SHIFTED)
    return exchange.codec is Codec.NONE and exchange.reach is None and exchange.steady not in keeping


@dataclass(frozen=True)
class _Recorded:
    recording: Recording
    output: Any


class RecordedSteps:
    """All recordings of one rank, for arguments of one form; other forms begin again."""

    def __init__(self, plan: Plan, recorder: Recorder) -> None:
        self._patterns = step_patterns(plan)
        self._recorder: Recorder | None = recorder
        self._rehearsed: set[StepPattern] = set()
        self._recorded: dict[StepPattern, _Recorded] = {}
        self._arguments: Any = None
        self._memo: dict[str, tuple[Tensor, ...]] = {}
        self._has_memo = False

    def begin_image(self) -> None:
        """What is made once an image will be made again."""
        self._has_memo = False

    def hold(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, in tensors that stay the same ones from step to step and from image to image."""
        given = {**arguments, "timestep": torch.as_tensor(arguments["timestep"])}
        if _is_like(self._arguments, given):
            _copy(given, self._arguments)
        else:
            self._rehearsed.clear()
            self._recorded.clear()
            self._memo.clear()
            with torch.inference_mode(
                False
            ):  # what is made in inference mode could not be written outside of it
                self._arguments = _fresh(given, arguments["sample"].device)
        return dict(self._arguments)

    def run(self, context: RankContext, work: Callable[[], Any]) -> Any:
        """What `work`, this rank's part of the current step, returns: from a replay if there is a recording."""
        step = context.exchanger.step
        pattern = self._patterns[step]
        if step == 0 or pattern not in self._rehearsed or self._recorder is None:
            self._rehearsed.add(pattern)
            return work()
        self._keep_memo(context)
        if pattern not in self._recorded:
            return self._record(context, self._recorder, pattern, work)
        found = self._recorded[pattern]
        context.exchanger.skip_layers()
        found.recording.replay(step)
        return found.output

    def _record(
        self, context: RankContext, recorder: Recorder, pattern: StepPattern, work: Callable[[], Any]
    ) -> Any:
        try:
            recording, output = recorder.record(context.exchanger.step, work)
        except RecordingError as error:
            warnings.warn(f"{error}; steps run one operation at a time", RuntimeWarning, stacklevel=2)
            self._recorder = None
            context.exchanger.restart_step()
            return work()
        self._recorded[pattern] = _Recorded(recording, output)
        return output

    def _keep_memo(self, context: RankContext) -> None:
        """Have what this image's first step made where the recordings read it."""
        if self._has_memo:
            return
        self._has_memo = True
        for name, (source, made) in context.image_memo.items():
            kept = self._memo.setdefault(name, made)
            for place, value in zip(kept, made, strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)
            if made and made[0].data_ptr() != kept[0].data_ptr():
                context.image_memo[name] = (source, kept)


def _fresh(value: Any, device: torch.device) -> Any:
    """The same nested value with tensors of its own, on the device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _fresh(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_fresh(item, device) for item in value)
    return value


def _is_like(held: Any, value: Any) -> bool:
    """Whether `held` has room for `value`: tensors of the same shapes and dtypes, and equal other values."""
    if isinstance(value, Tensor):
        return isinstance(held, Tensor) and (held.shape, held.dtype) == (value.shape, value.dtype)
    if isinstance(value, Mapping):
        same = isinstance(held, Mapping) and held.keys() == value.keys()
        return same and all(_is_like(held[key], item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        same = isinstance(held, (list, tuple)) and len(held) == len(value)
        return same and all(_is_like(*pair) for pair in zip(held, value, strict=True))
    return bool(held is value or held == value)


def _copy(value: Any, held: Any) -> None:
    if isinstance(value, Tensor):
        held.copy_(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _copy(item, held[key])
    elif isinstance(value, (list, tuple)):
        for item, place in zip(value, held, strict=True):
            _copy(item, place)
