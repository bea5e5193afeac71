"""What is kept of a run so that it can go on after a fault: every step's gathered output, and what each rank held.

A resumed run calls the pipeline from the beginning. At a step that was completed, the denoiser's recorded output is
returned and no layer runs; so the scheduler, the noise and the callbacks take exactly the course they took, whatever
state they keep, and the first step that really runs starts from the same bits. On the same ranks it also reads the
same versions of the others' activations; otherwise it is a fresh step (see docs/decisions/0006-resume-by-replay.md).

    step-00012.outputs.safetensors            outputs of the steps since the checkpoint before, up to 12 (exclusive)
    step-00012.rank-1-of-2.safetensors        what rank 1 held after 12 steps

Invariant: a file appears whole or not at all, says which run it belongs to, and carries a checksum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distri.core.plan import Plan
from distri.errors import CheckpointError, RunError

MAX_FILE_BYTES = 64 * 2**30
MAX_FILES = 20_000
KEPT = 2
NAME = re.compile(r"step-(\d{5})\.(?:outputs|rank-(\d{1,5})-of-(\d{1,5}))\.safetensors")
Held = Mapping[str, Tensor]


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same for a run to go on: all that decides the picture, save how it is spread over ranks."""

    model: str
    image: str
    prompt: str
    negative_prompt: str
    seed: int
    guidance_scale: float
    dtype: str
    weights: str = ""

    @staticmethod
    def of(plan: Plan, prompt: str, negative_prompt: str, seed: int, guidance_scale: float) -> RunIdentity:
        """The identity of a run by its plan and what is drawn; the weights are known once they are loaded."""
        image = plan.image
        return RunIdentity(
            f"{plan.model.name} {plan.model.fingerprint[:16]}",
            f"{image.num_images} of {image.height}x{image.width}, {image.num_inference_steps} steps",
            prompt,
            negative_prompt,
            seed,
            guidance_scale,
            plan.dtype,
        )

    def with_weights(self, digest: str) -> RunIdentity:
        """This identity, with the digest of the weights."""
        return dataclasses.replace(self, weights=digest)


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on. held: what a rank held there, if these are the same ranks; else the step is fresh."""

    step: int
    outputs: tuple[Tensor, ...]
    held: Callable[[int], Held] | None = field(repr=False, compare=False)

    @property
    def summary(self) -> str:
        """In words, for ranks to compare."""
        return f"step {self.step}, {'with' if self.held is not None else 'without'} the versions held"


@dataclass(frozen=True)
class _File:
    path: Path
    step: int
    rank: int | None
    size: int | None


class CheckpointDirectory:
    """The checkpoint of one run in one directory."""

    def __init__(self, path: Path, identity: RunIdentity, plan: Plan) -> None:
        self.path = path
        self._identity = identity
        self._plan = plan

    def find(self, last_step: int | None = None) -> ResumePoint | None:
        """The newest point that can be resumed from, not after `last_step`; None if there is none yet.

        The newest at which these very ranks all left what they held, before any other: it gives the same picture.

        Raises:
            CheckpointError: a file is damaged or belongs to another run.
        """
        files = self._files()
        outputs = self._outputs([file for file in files if file.rank is None], last_step)
        if not outputs:
            return None
        steps = [step for step, _ in outputs]
        exact = [step for step in steps if self._is_exact(files, step)]
        step = max(exact or steps)
        tensors = tuple(tensor for after, found in outputs if after <= step for tensor in found)
        is_last = step >= self._plan.image.num_inference_steps
        assert len(tensors) == step
        held = (lambda rank: self._held(files, step, rank)) if exact and not is_last else None
        return ResumePoint(step, tensors, held)

    def _outputs(self, files: list[_File], last_step: int | None) -> list[tuple[int, list[Tensor]]]:
        """(steps completed, outputs since the file before), for as long as there is no gap."""
        found: list[tuple[int, list[Tensor]]] = []
        completed = 0
        for file in sorted(files, key=lambda file: file.step):
            if last_step is not None and file.step > last_step:
                break
            tensors, facts = self._read(file.path)
            if facts.get("first") != str(completed) or set(tensors) != set(
                map(str, range(completed, file.step))
            ):
                break
            found.append((file.step, [tensors[str(step)] for step in range(completed, file.step)]))
            completed = file.step
        return found

    def _is_exact(self, files: list[_File], step: int) -> bool:
        """Whether all ranks of this very plan left what they held."""
        if step >= self._plan.image.num_inference_steps:
            return True
        size = self._plan.mesh.size
        ranks = {file.rank for file in files if file.step == step and file.size == size}
        return set(range(size)) <= ranks and all(
            self._facts(file.path).get("plan") == self._plan.hash
            for file in files
            if file.step == step and file.size == size
        )

    def _held(self, files: list[_File], step: int, rank: int) -> Held:
        for file in files:
            if (file.step, file.rank, file.size) == (step, rank, self._plan.mesh.size):
                return self._read(file.path)[0]
        raise CheckpointError(f"{self.path}: what rank {rank} held after step {step} is no longer there")

    def _files(self) -> list[_File]:
        if not self.path.is_dir():
            return []
        found = []
        for place, path in enumerate(sorted(self.path.iterdir())):
            if place >= MAX_FILES:
                raise CheckpointError(
                    f"{self.path}: holds more than {MAX_FILES} files, which no checkpoint does"
                )
            match = NAME.fullmatch(path.name)
            if match is not None:
                step, rank, size = match.groups()
                found.append(_File(path, int(step), *(None if x is None else int(x) for x in (rank, size))))
        return found

    def _facts(self, path: Path) -> dict[str, str]:
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise CheckpointError(f"{path}: larger than {MAX_FILE_BYTES} bytes, which no checkpoint is")
            with safe_open(path, "pt") as file:
                return dict(file.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not an intact checkpoint: {_first_line(error)}") from error

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of a file that is intact and belongs to this run."""
        facts = self._facts(path)
        self._check_identity(path, facts)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not an intact checkpoint: {_first_line(error)}") from error
        if checksum(tensors) != facts.get("checksum"):
            raise CheckpointError(
                f"{path}: not an intact checkpoint: its checksum is another than when it was written"
            )
        return tensors, facts

    def _check_identity(self, path: Path, facts: Mapping[str, str]) -> None:
        try:
            theirs = json.loads(facts.get("run", ""))
        except ValueError:
            theirs = None
        if not isinstance(theirs, dict):
            raise CheckpointError(f"{path}: not an intact checkpoint: it does not say which run it is of")
        for name, ours in dataclasses.asdict(self._identity).items():
            if name == "weights" and not ours:
                continue  # not loaded yet
            if theirs.get(name) != ours:
                raise CheckpointError(
                    f"{path}: the checkpoint of another run: its {name.replace('_', ' ')} is "
                    f"{theirs.get(name)!r}, here it is {ours!r}"
                )

    def clear(self, after: int = -1) -> None:
        """Remove what lies after a step, or everything, and the directory if it held nothing else."""
        with contextlib.suppress(OSError):
            for file in self._files():
                if file.step > after:
                    file.path.unlink(missing_ok=True)
            self.path.rmdir()


class CheckpointWriter:
    """Writes a run's checkpoint every few steps, from every process; rank 0's writes the outputs."""

    def __init__(self, directory: CheckpointDirectory, every: int, start: ResumePoint | None = None) -> None:
        self._directory = directory
        self._every = every
        self._written = start.step if start is not None else 0
        self._pending: dict[str, Tensor] = {}

    def step_done(self, step: int, output_BCHW: Tensor, held: Mapping[int, Callable[[], Held]]) -> None:
        """Called after step number `step`. held: for each rank of this process, what it holds, copied when asked.

        Raises:
            RunError: the file system refuses.
        """
        plan = self._directory._plan
        completed, last = step + 1, plan.image.num_inference_steps
        if 0 in held:
            self._pending[str(step)] = output_BCHW.detach().to("cpu", copy=True).contiguous()
        if completed % self._every and completed != last:
            return
        for rank, copy in held.items():
            if completed < last:
                name = f"step-{completed:05}.rank-{rank}-of-{plan.mesh.size}.safetensors"
                self._write(name, copy(), step)
                self._forget(rank, completed)
        if 0 in held:
            self._write(f"step-{completed:05}.outputs.safetensors", self._pending, step)
            self._written = completed
            self._pending = {}

    def _forget(self, rank: int, completed: int) -> None:
        """Remove what a rank held long ago: the last two are kept, since not all ranks may have written the last."""
        plan = self._directory._plan
        own = [f for f in self._directory._files() if (f.rank, f.size) == (rank, plan.mesh.size)]
        for file in sorted(own, key=lambda file: file.step)[:-KEPT]:
            file.path.unlink(missing_ok=True)

    def _write(self, name: str, tensors: Held, step: int) -> None:
        facts = {
            "run": json.dumps(dataclasses.asdict(self._directory._identity)),
            "plan": self._directory._plan.hash,
            "first": str(self._written),
            "checksum": checksum(tensors),
        }
        path = self._directory.path / name
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), unfinished, metadata=facts)
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or _first_line(error)
            raise RunError(f"the checkpoint of step {step} cannot be written to {path}: {reason}") from error


def checksum(tensors: Held) -> str:
    """CRC-32 over names and bytes, in the order of names."""
    import torch

    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def directory_of(resume: Path) -> tuple[Path, int | None]:
    """The directory and the last step that `--resume` names: a directory, or one of its files.

    Raises:
        CheckpointError: it is neither.
    """
    if resume.is_dir():
        return resume, None
    match = NAME.fullmatch(resume.name)
    if resume.is_file() and match is not None:
        return resume.parent, int(match[1])
    if resume.is_file():
        raise CheckpointError(f"{resume}: not a checkpoint: those are named step-00012.outputs.safetensors")
    raise CheckpointError(f"{resume}: there is no such checkpoint")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
