"""The torch backend on gloo ranks: the contract against an oracle, agreement at the start, and every kind of end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distri.backends.torch_distributed.agreement import decode, describe_tensors, encode
from distri.backends.torch_distributed.arena import merged
from distri.backends.torch_distributed.giving_way import giving_way
from distri.backends.torch_distributed.routes import Routes
from distri.core.program import held_buckets
from distri.errors import RunError, UserError
from distri.launch import run_ranks, threads_per_rank, under_launcher
from tests.backends.rank_targets import toy_plan

TARGETS = "tests.backends.rank_targets"
ROOT = Path(__file__).parents[2]


def on_ranks(function, case, num_ranks=None, **more):
    return run_ranks(num_ranks or case["ranks"], f"{TARGETS}:{function}", case, timeout_s=20, **more)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


CASES = {
    2: [
        {"delays": True},
        {"delays": True, "policy": "extrapolated", "layers_per_bucket": 1},
        {"policy": "separate_gn"},
        {"policy": "local"},
        {"steps": 2, "warmup": 2},
        {"cfg_split": True},
        {"refreshed": [3, 5, 6], "steps": 8, "delays": True},
        {"refreshed": [4], "local_warmup": ["halo"], "layers_per_bucket": 60},
    ],
    3: [
        {"weights": [3, 1, 2], "delays": True, "images": 2},
        {"axis": "cols", "policy": "stale", "layers_per_bucket": 60},
        {"policy": "fresh"},
        {"policy": "no_sync", "warmup": 3},
        {"policy": "extrapolated", "delays": True},
        {"refreshed": [4], "local_warmup": ["context", "moments"], "delays": True},
    ],
    4: [
        {"axis": "grid", "layers_per_bucket": 2},
        {"cfg_split": True, "policy": "sync_gn", "delays": True},
    ],
}


@pytest.mark.parametrize("num_ranks", CASES)
def test_every_rank_sees_exactly_the_versions_of_the_contract(num_ranks):
    cases = [{"ranks": num_ranks, **case} for case in CASES[num_ranks]]
    for case, done in zip(cases, run_ranks(num_ranks, f"{TARGETS}:hold_contracts", cases), strict=True):
        assert len(set(done["allocations"])) <= 1, f"{case}: allocated after the first displaced step"
        assert done["places_stay"], case


def test_a_steady_step_sends_one_parcel_a_bucket():
    cases = [{"ranks": 2, "steps": steps, "warmup": 1, "layers_per_bucket": 4} for steps in (4, 6)]
    few, many = run_ranks(2, f"{TARGETS}:hold_contracts", cases)
    assert many["messages"][-1] - few["messages"][-1] == 2 * 3


def test_the_messages_of_a_step_s_second_half_leave_when_the_next_step_begins():
    case = {"ranks": 2, "steps": 6, "warmup": 2, "layers_per_bucket": 4}
    plan = toy_plan(case)
    held = held_buckets(plan)
    assert 0 < len(held) < plan.num_buckets
    (done,) = run_ranks(2, f"{TARGETS}:hold_contracts", [case])
    sent = [after - before for before, after in zip(done["messages"], done["messages"][1:], strict=False)]
    assert sent[1:] == [plan.num_buckets - len(held), plan.num_buckets, plan.num_buckets, len(held)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has threads that wake up without preempting")
def test_gloo_gives_way_where_it_is_waited_for_and_all_else_is_scheduled_as_usual():
    policies = on_ranks("policies_of_threads", {"ranks": 2})
    loops = sorted(policy for name, policy in policies if name == "gloo_tcp_loop")
    if loops:  # torch 2.11 does not name them
        assert loops == [os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_BATCH], "late; urgent and the output's"
    assert [policy for _, policy in policies].count(os.SCHED_BATCH) >= 2
    own = {name: policy for name, policy in policies if name.startswith("own: ")}
    assert {"own: MainThread", "own: distri-late", "own: distri-urgent"} <= own.keys()
    assert set(own.values()) == {os.SCHED_OTHER}, own


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has threads that wake up without preempting")
def test_where_the_scheduler_s_policy_is_forbidden_groups_are_made_all_the_same(monkeypatch):
    def forbidden(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    with giving_way():
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_values_are_broadcast_as_rank_0_has_them_and_objects_are_refused():
    nothing, plain, refused = on_ranks("share_values", {"ranks": 3})
    assert nothing is None
    assert plain == [True, 1.5, "x"]
    assert "cannot send a object: only tensors, plain values" in refused


def test_ranks_with_different_plans_are_refused():
    with pytest.raises(RunError, match=r"do not agree on the plan: rank 0 .* has .*, rank 1 .* has "):
        on_ranks("meet", {"ranks": 2, "rank 1": {"warmup": 1}})


def test_a_plan_for_another_number_of_ranks_is_refused():
    with pytest.raises(UserError, match="the plan is for 2 ranks, but 3 were started"):
        on_ranks("meet", {"ranks": 2}, num_ranks=3)


def test_a_rank_that_raises_stops_the_others_and_is_named():
    started = time.monotonic()
    with pytest.raises(RunError, match=r"^rank 1 \(.*, pid \d+\): step 3: MemoryError: no room for conv1$"):
        on_ranks("fail_in_step", {"ranks": 3, "step": 3, "rank": 1, "fate": "raise"})
    assert time.monotonic() - started < 15


def test_a_rank_that_is_closed_within_a_step_stops_the_others_without_being_told_why():
    started = time.monotonic()
    with pytest.raises(
        RunError, match=r"^rank 0 .*: ArithmeticError: not a number in conv1; met by rank 0 .*step 3, norm1"
    ):
        on_ranks("fail_in_step", {"ranks": 2, "step": 3, "rank": 0, "fate": "stop inside", "aborts": False})
    assert time.monotonic() - started < 15


def test_a_user_error_stays_one():
    with pytest.raises(UserError, match=r"^this cannot be drawn$"):
        on_ranks("fail_in_step", {"ranks": 2, "step": 1, "rank": 1, "fate": "refuse"})


@pytest.mark.parametrize(
    ("rank", "fate", "death"), [(1, "SIGKILL", r"signal 9 \(SIGKILL\)"), (0, "exit", "status 7")]
)
def test_a_rank_that_dies_is_named_with_where_it_was_missed(rank, fate, death):
    with pytest.raises(
        RunError, match=rf"^rank {rank} .*{death}.*; met by rank \d .*: step [23], "
    ) as raised:
        on_ranks("fail_in_step", {"ranks": 2, "step": 3, "rank": rank, "fate": fate})
    assert wait_until(lambda: not any(map(is_alive, pids_in(str(raised.value)))))


def pids_in(message):
    return [int(part.partition(")")[0]) for part in message.split("pid ")[1:]]


def test_a_rank_that_hangs_is_given_up_after_the_timeout_and_killed():
    with pytest.raises(RunError, match="lost rank 2: nothing came from it within 3 s"):
        on_ranks("fail_in_step", {"ranks": 3, "step": 3, "rank": 2, "fate": "SIGSTOP", "timeout_s": 3})


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_parent_that_is_interrupted_or_killed(tmp_path, signal_number):
    call = f"run_ranks(2, '{TARGETS}:spawn_and_wait', {{'pids': '{tmp_path}/'}})"
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's `&` has it ignored
    parent = subprocess.Popen(
        [sys.executable, "-c", f"from distri.launch import run_ranks; {heed}; {call}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    files = [tmp_path / "0", tmp_path / "1"]
    try:
        assert wait_until(lambda: all(file.exists() and file.read_text() for file in files), 30)
        ranks, children = zip(*(map(int, file.read_text().split()) for file in files), strict=True)
        parent.send_signal(signal_number)
        assert parent.wait(timeout=15) != 0
        assert wait_until(lambda: not any(map(is_alive, ranks)))
        if signal_number == signal.SIGINT:  # a killed parent cannot end what its ranks have started
            assert wait_until(lambda: not any(map(is_alive, children)))
        for child in filter(is_alive, children):
            os.kill(child, signal.SIGKILL)
    finally:
        parent.kill()
        parent.communicate()


def test_progress_and_result_are_those_of_rank_0():
    heard = []
    result = on_ranks("echo", {"ranks": 2, "text": "ä"}, on_progress=lambda *values: heard.append(values))
    assert heard == [("started", "0")]
    assert result[:3] == [{"ranks": 2, "text": "ä"}, "0", "2"]
    assert result[3] != os.getpid()


def test_under_a_launcher_the_function_runs_here(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert on_ranks("echo", {"ranks": 2})[3] == os.getpid()
    assert under_launcher()
    assert not under_launcher({"RANK": "0"})


def test_what_cannot_be_run_is_refused_before_anything_starts():
    with pytest.raises(UserError, match="at least 1 rank"):
        run_ranks(0, f"{TARGETS}:echo", None)
    with pytest.raises(UserError, match="'module:function'"):
        run_ranks(2, "echo", None)


def test_torchrun_starts_the_same_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os\nfrom distri.launch import run_ranks\n"
        f"done = run_ranks(2, '{TARGETS}:hold_contract', {{'ranks': 2}})\n"
        "open(os.environ['DONE'] + os.environ['RANK'], 'w').write(json.dumps(done))\n",
        encoding="utf-8",
    )
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DONE": f"{tmp_path}/done", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert all(json.loads((tmp_path / f"done{rank}").read_text())["places_stay"] for rank in range(2))


def test_ranks_share_the_cores():
    assert threads_per_rank(1) >= threads_per_rank(2) >= threads_per_rank(10**6) == 1


def test_structures_survive_their_encoding():
    value = {"a": (1, [None, {2: "x"}]), "b": 0.1}
    text, tensors = encode(value)
    assert decode(text, tensors) == value
    assert describe_tensors(text) == []


def test_adjacent_layers_are_one_message():
    assert merged([(0, 4), (4, 6), (8, 9)]) == [(0, 6), (8, 9)]


def test_buckets_of_a_steady_step_are_those_of_the_plan():
    plan = toy_plan({"ranks": 2, "layers_per_bucket": 4})
    ends = Routes(plan, 0).last_of_bucket
    by_layer = plan.by_layer
    assert [by_layer[layer].bucket for layer in ends.values()] == list(range(plan.num_buckets))
    assert all(e.index <= by_layer[ends[e.bucket]].index for e in plan.exchanges if e.bucket is not None)
