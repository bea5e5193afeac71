"""The deployment examples, as far as they can be checked without a cluster: they parse, and their commands exist."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from distri.cli.run import command

DEPLOY = Path(__file__).parents[1] / "deploy"
OPTIONS = {name for parameter in command.params for name in parameter.opts}


def options_after_run(words: list[str]) -> list[str]:
    """The flags that an example hands to `distri run`."""
    start = words.index("run")
    return [word.split("=")[0] for word in words[start:] if word.startswith("-")]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_slurm_script_is_a_shell_script() -> None:
    subprocess.run(["bash", "-n", DEPLOY / "slurm.sh"], check=True)


def test_the_slurm_script_calls_distri_as_it_is() -> None:
    text = (DEPLOY / "slurm.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("srun")]
    assert set(options_after_run(shlex.split(line))) <= OPTIONS


def test_the_kubernetes_objects_belong_together() -> None:
    service, job = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert set(options_after_run(container["args"])) <= OPTIONS
    nodes = next(word for word in container["args"] if word.startswith("--nnodes=")).split("=")[1]
    assert int(nodes) == job["spec"]["parallelism"] == job["spec"]["completions"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_dockerfile_keeps_to_good_habits() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    assert words[0][0] == "FROM"
    assert ":" in words[0][1]
    assert not words[0][1].endswith(":latest")
    runs = [" ".join(line) for line in words if line[0] == "RUN"]
    for run in runs:
        if "apt-get install" in run:
            assert "apt-get update" in run
            assert "--no-install-recommends" in run
            assert "rm -rf /var/lib/apt/lists" in run
    copied = [word for line in words if line[0] == "COPY" for word in line[1:-1]]
    assert all((DEPLOY.parent / word).exists() for word in copied)
    assert ["USER", "distri"] in words
