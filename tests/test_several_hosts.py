"""`torchrun --nnodes` with every host in a network namespace of its own (Linux, root; skipped elsewhere)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.namespaces import SUBNET, Network, Unavailable, check_available
from distri import executor
from tests.test_faults import request_for

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    try:
        check_available()
    except Unavailable as reason:
        pytest.skip(str(reason))


def start(network: Network, host: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "wire",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [
        *network.command(host), sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
        "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test",
        "--rdzv-endpoint", f"{SUBNET}.1:{port}", "--local-addr", f"{SUBNET}.{host + 1}",
        "--rdzv-conf", f"is_host={host == 0}",  # all namespaces share one host name
        "-m", "distri", "run", "--model", "demo", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.slow
def test_two_hosts_draw_what_one_process_draws(tmp_path: Path) -> None:
    request = request_for(tmp_path, 2, backend="in_process", checkpoint_every=0, steps=3)
    executor.run(request)
    arguments = ["--gpus", "2", "--cfg-split", "off", "--height", "96", "--width", "64"]
    arguments += ["--num-inference-steps", "3", "--warmup-steps", "2", "--guidance-scale", "5"]
    arguments += ["--prompt", request.prompt, "-o", str(tmp_path / "hosts.png")]
    with Network(2, None) as network:
        port = free_port()
        hosts = [start(network, host, port, *arguments) for host in range(2)]
        said = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert (tmp_path / "hosts.png").read_bytes() == (tmp_path / "out.png").read_bytes()
