"""What is the same for all commands: help, version, exit status, one line for an error."""

import subprocess
import sys

import pytest

import distri as package
from distri import executor
from distri.cli import COMMANDS
from distri.errors import RunError
from tests.cli.conftest import Distri


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help_with_examples(distri: Distri, command: str, flag: str) -> None:
    outcome = distri(command, flag)
    assert outcome.status == 0
    assert "Examples:" in outcome.out
    assert f"distri {command}" in outcome.out


def test_every_command_is_listed(distri: Distri) -> None:
    for outcome in (distri(), distri("-h")):
        assert outcome.status == 0
        assert all(f"  {command} " in outcome.out for command in COMMANDS)


def test_the_version_is_the_packages(distri: Distri) -> None:
    assert package.__version__ in distri("--version").out


def test_an_unknown_command_is_one_line_and_status_two(distri: Distri) -> None:
    outcome = distri("paint")
    assert outcome.complaint == "No such command 'paint'."
    assert outcome.status == 2


def test_a_run_that_could_not_go_on_is_one_line_and_status_one(
    distri: Distri, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> executor.RunResult:
        raise RunError("rank 1, step 3: gone\nand more")

    monkeypatch.setattr(executor, "run", fail)
    outcome = distri("run", "--gpus", "2", "--cfg-split", "off", "-o", "out.png")
    assert outcome.complaint == "rank 1, step 3: gone and more"
    assert outcome.status == 1


def test_an_interrupted_run_says_so(distri: Distri, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> executor.RunResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "run", interrupt)
    outcome = distri("run", "--gpus", "2", "--cfg-split", "off", "-o", "out.png")
    assert outcome.err.strip() == "distri: error: interrupted"
    assert outcome.status == 130


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    command = f"{sys.executable} -m distri graph --format json | head -c 10"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert done.stdout == '{"schema":'
    assert done.stderr == ""
