"""Faults of every kind in every phase of a run: one message, nothing left behind, the same picture after a resume."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distri import executor, precautions
from distri.checkpoint import CheckpointDirectory
from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.errors import CheckpointError, OutputError, PlanError, RunError
from distri.models.presets import load_graph
from distri.request import RunRequest
from tests.backends.test_torch_distributed import is_alive, pids_in, wait_until
from tests.fault_targets import LAYER, STEP_OF, STEPS, VARIABLE, WARMUP

TIMEOUT_S = 12.0
LIMIT_S = TIMEOUT_S + 15.0  # from the fault to the end: to be missed, to be told, and to be put away
WHO = r"rank {} \([^)]*, pid \d+\): "


def request_for(
    folder: Path, ranks: int = 2, policy: str = "corrected", steps: int = STEPS, **more: Any
) -> RunRequest:
    plan = make_plan(
        PlanRequest(ImageRequest(96, 64, steps), ranks, False, policy_table(policy), WARMUP, dtype="float32"),
        load_graph("demo"),
    )
    return RunRequest(
        "demo",
        plan,
        "a red circle above a blue square on a green ground",
        output=folder / "out.png",
        timeout_s=TIMEOUT_S,
        **{"checkpoint_every": 1, "checkpoint": folder / "kept", **more},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """The pictures without a fault, drawn in process: the same bits, as the conformance tests hold."""
    pictures = {}
    threads = torch.get_num_threads()
    for ranks in (2, 3):
        folder = tmp_path_factory.mktemp("undisturbed")
        executor.run(request_for(folder, ranks, backend="in_process", checkpoint_every=0))
        pictures[ranks] = (folder / "out.png").read_bytes()
    torch.set_num_threads(threads)
    return pictures


PHASES = ("load", "warm-up", "steady", "decode")
NEAR = "mid_block.attentions.0.transformer_blocks.1.attn1"
"""The layer that exchanged something last before the one that fails."""

KILLED = WHO + r"was killed by signal 9 \(SIGKILL\)"
NO_LIFE = WHO + r"gave no sign of life for \d+ s"
LOST = r"step [{steps}], [\w.]+ \(\w+\), version \d+: lost rank {rank}: (?:nothing came from it|it closed)"
OOM = r"OutOfMemoryError: CUDA out of memory\. Tried to allocate 96\.00 GiB\."
FULL = r"No space left on device"
KEPT_NOT = WHO + r".*checkpoint of step {begun} cannot be written to .*: " + FULL
CUT = r"lost rank|the rendezvous store is gone"
CUT_IN_BROADCAST = f"{CUT}|lost a rank"  # the handshake's first message; nobody sees whose part of it failed
CUT_IN_LAYER = rf"step [{{steps}}], [\w.]+.*: (?:{CUT})"

# What must be said, for each kind of fault in each of the phases.
SAID: dict[str, tuple[str, str, str, str]] = {
    "kill -9": (KILLED, *[KILLED + ".*; met by rank .*: step [{steps}], "] * 2, KILLED),
    "stop": (NO_LIFE, *[f"{LOST}|{NO_LIFE}"] * 2, NO_LIFE),
    "out of memory": (WHO + OOM, *[WHO + "step {begun}, {near}: " + OOM] * 2, WHO + ".*" + OOM),
    "disk full": (*[KEPT_NOT] * 3, "out.png: cannot be written: " + FULL),
    "closed socket": (CUT_IN_BROADCAST, *[CUT_IN_LAYER] * 2, CUT),
}
CASES = list(product(SAID, PHASES, (2, 3)))


def rank_that_fails(kind: str, phase: str, ranks: int) -> int:
    """Every rank has its turn; the picture is written by rank 0."""
    turn = CASES.index((kind, phase, ranks)) // 2 + PHASES.index(phase)
    return 0 if (kind, phase) == ("disk full", "decode") else turn % ranks


def what_is_said(kind: str, phase: str, ranks: int) -> str:
    """The pattern of the message. The others may be a step ahead of the rank that fails, as steps are displaced."""
    begun = STEP_OF.get(phase, 0)
    values = {
        "{}": rank_that_fails(kind, phase, ranks),
        "{rank}": rank_that_fails(kind, phase, ranks),
        "{begun}": begun,
        "{steps}": f"{begun}{begun + 1}" if phase == "steady" else begun,
        "{near}": re.escape(NEAR),
    }
    pattern = SAID[kind][PHASES.index(phase)]
    for name, value in values.items():
        pattern = pattern.replace(name, str(value))
    return pattern


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "phase", "ranks"), CASES)
def test_a_fault_ends_the_run_with_one_message_and_it_can_go_on(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[int, bytes],
    kind: str,
    phase: str,
    ranks: int,
) -> None:
    begun = tmp_path_factory.mktemp("fault") / "begun"
    fault = {"kind": kind, "phase": phase, "rank": rank_that_fails(kind, phase, ranks), "begun": str(begun)}
    monkeypatch.setattr(executor, "RANK_BODY", "tests.fault_targets:run_as_rank")
    monkeypatch.setenv(VARIABLE, json.dumps(fault))
    request = request_for(tmp_path, ranks)
    with pytest.raises((RunError, OutputError)) as raised:
        executor.run(request)
    assert time.time() - begun.stat().st_mtime < LIMIT_S
    message = str(raised.value)
    assert re.search(what_is_said(kind, phase, ranks), message), message
    assert "\n" not in message
    assert wait_until(lambda: not any(map(is_alive, pids_in(message))))
    assert [path.name for path in tmp_path.iterdir() if path.name != "kept"] == []
    monkeypatch.delenv(VARIABLE)
    if phase == "load":  # no step was completed: nothing to go on from, which a resume says
        with pytest.raises(CheckpointError):
            executor.run(dataclasses.replace(request, resume=tmp_path / "kept"))
        return
    executor.run(dataclasses.replace(request, resume=tmp_path / "kept"))
    assert (tmp_path / "out.png").read_bytes() == undisturbed[ranks]
    assert not (tmp_path / "kept").exists()


class StopHere(Exception):
    """A run that ends for a reason of its own."""


def stop_at(step: int) -> Any:
    def progress(done: int, _: int) -> None:
        if done == step:
            raise StopHere

    return progress


def interrupted(request: RunRequest, step: int) -> None:
    with pytest.raises(StopHere):
        executor.draw(request, stop_at(step))


@pytest.fixture(autouse=True)
def threads() -> Any:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.mark.parametrize(
    "policy", ["corrected", "no_sync", "extrapolated", "residual_int4", "partial", "fresh"]
)
def test_a_run_resumed_on_the_same_ranks_gives_the_same_bits(tmp_path: Path, policy: str) -> None:
    ranks = 3 if policy == "partial" else 2
    request = request_for(tmp_path, ranks, policy, backend="in_process", checkpoint_every=2)
    whole = executor.draw(dataclasses.replace(request, checkpoint_every=0), decodes=False)
    interrupted(request, 5)
    resumed = executor.draw(dataclasses.replace(request, resume=tmp_path / "kept"), decodes=False)
    assert torch.equal(whole.latent_BCHW, resumed.latent_BCHW)


def test_on_other_ranks_the_first_step_is_fresh(tmp_path: Path) -> None:
    """With one step left, that step is one device's; with more, the others are stale again."""

    def difference(step: int) -> float:
        kept = tmp_path / f"kept{step}"
        interrupted(request_for(tmp_path, 3, backend="in_process", checkpoint=kept), step)
        more = {"backend": "in_process", "checkpoint_every": 0, "resume": kept}
        fewer, alone = (
            executor.draw(request_for(tmp_path, ranks, **more), decodes=False).latent_BCHW for ranks in (2, 1)
        )
        return float((fewer - alone).abs().max())

    assert difference(STEPS - 1) < 1e-4
    assert difference(4) > 1e-3
    interrupted(request_for(tmp_path, 3, backend="in_process"), 4)
    frozen = request_for(
        tmp_path, 2, "no_sync", backend="in_process", checkpoint_every=0, resume=tmp_path / "kept"
    )
    with pytest.raises(PlanError, match="resume on the same ranks, or draw from the beginning"):
        executor.draw(frozen, decodes=False)


@pytest.fixture
def kept(tmp_path: Path) -> RunRequest:
    """A request to resume a run that stopped after four of its steps."""
    request = request_for(tmp_path, 2, backend="in_process", checkpoint_every=2)
    interrupted(request, 4)
    return dataclasses.replace(request, resume=tmp_path / "kept")


def files_of(request: RunRequest, part: str) -> list[Path]:
    assert request.resume is not None
    return sorted(path for path in request.resume.iterdir() if part in path.name)


def test_a_truncated_checkpoint_is_refused(kept: RunRequest) -> None:
    file = files_of(kept, "outputs")[0]
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"step-00002.outputs.safetensors: not an intact checkpoint: "):
        executor.run(kept)


CHECKSUM = "its checksum is another than when it was written"
HEADER = r"Error while deserializing header: [^;\n]+"


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("part", "step", "reason"),
    [
        *[("outputs", step, CHECKSUM) for step in (WARMUP - 1, WARMUP + 2, STEPS)],
        ("rank-1", WARMUP - 1, HEADER),  # nothing is held yet, so the last bit is the header's
        ("rank-1", WARMUP + 2, CHECKSUM),  # after the last step nobody reads them
    ],
)
def test_a_checkpoint_with_one_wrong_bit_is_refused(
    tmp_path: Path, part: str, step: int, reason: str, ranks: int
) -> None:
    """In one sentence, whether it is found before the ranks start or by the rank whose it is, in whatever phase."""
    request = request_for(tmp_path, ranks, backend="in_process")
    interrupted(request, step)
    on_ranks = dataclasses.replace(request, backend="torch", resume=tmp_path / "kept")
    file = files_of(on_ranks, part)[-1]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"^\S+safetensors: not an intact checkpoint: {reason}$"):
        executor.run(on_ranks)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_checkpoint_of_another_run_is_refused(kept: RunRequest) -> None:
    with pytest.raises(CheckpointError, match=r"of another run: its seed is 0, here it is 7$"):
        executor.run(dataclasses.replace(kept, seed=7))


def test_the_checkpoint_of_other_weights_is_refused(kept: RunRequest) -> None:
    assert kept.resume is not None
    identity = precautions.identity_of(kept).with_weights("0" * 32)
    with pytest.raises(CheckpointError, match="of another run: its weights is"):
        CheckpointDirectory(kept.resume, identity, kept.plan).find()


def test_a_file_that_says_nothing_of_its_run_is_refused(kept: RunRequest) -> None:
    file = files_of(kept, "outputs")[0]
    save_file(load_file(file), file)
    with pytest.raises(CheckpointError, match="it does not say which run it is of"):
        executor.run(kept)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        executor.run(request_for(tmp_path, resume=tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint of a completed step"):
        executor.run(request_for(tmp_path, resume=tmp_path / "empty"))


def test_a_step_that_not_all_ranks_kept_is_passed_over_for_one_that_they_did(kept: RunRequest) -> None:
    files_of(kept, "step-00004.rank-0")[0].unlink()
    point = precautions.find_start(kept)
    assert point is not None
    assert point.summary == "step 2, with the versions held"


def test_a_single_file_names_the_step_to_go_on_from(kept: RunRequest) -> None:
    point = precautions.find_start(dataclasses.replace(kept, resume=files_of(kept, "step-00002.outputs")[0]))
    assert point is not None
    assert point.step == 2


def test_what_is_not_finite_is_named_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distri.models.load as loading

    load = loading.load_pipeline

    def poisoned(*arguments: Any) -> Any:
        pipe = load(*arguments)
        pipe.unet.get_submodule("down_blocks.1.resnets.0.conv1").bias.data[3] = float("nan")
        return pipe

    monkeypatch.setattr(loading, "load_pipeline", poisoned)
    request = request_for(tmp_path, 2, backend="in_process", checkpoint_every=0, check_finite=1)
    with pytest.raises(
        RunError,
        match=r"^rank \d \(.*\): step 0, down_blocks\.1\.resnets\.0\.norm2 \(moments\): \d+ of \d+ values are NaN",
    ):
        executor.draw(request)


def test_a_finished_run_leaves_no_checkpoint(tmp_path: Path) -> None:
    executor.run(request_for(tmp_path, 2, backend="in_process", steps=3))
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_layers_of_the_fault_tests_are_the_models() -> None:
    order = [exchange.layer for exchange in request_for(Path()).plan.exchanges]
    assert order[order.index(LAYER) - 1] == NEAR
