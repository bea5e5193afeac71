"""What is never done: pickles, remote code, files without bounds, and a rendezvous that others can reach."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import distri
from distri.checkpoint import CheckpointDirectory, RunIdentity
from distri.config.plan import MAX_PLAN_BYTES, load_plan, parse_plan
from distri.errors import CheckpointError, ModelError, PlanError
from distri.launch import LOOPBACK, _environment
from distri.models.load import HUB_MODELS, load_pipeline
from tests.test_faults import request_for

SOURCES = sorted(Path(distri.__file__).parent.rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list",
    "send_object_list", "recv_object_list", "unsafe_load", "full_load",
}  # fmt: skip


def calls_in(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        (call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", ""), call)
        for call in calls
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_file_unpickles_or_runs_what_it_was_sent(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {
        str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    assert not imported & FORBIDDEN_MODULES
    for name, call in calls_in(tree):
        if isinstance(call.func, ast.Name) or name not in {"eval", "exec"}:  # `module.eval()` is torch's
            assert name not in FORBIDDEN_CALLS, f"{path.name}:{call.lineno}"
        if (
            ast.unparse(call.func) == "torch.load"
        ):  # what the demo's training wrote itself, and then no objects
            assert "weights_only=True" in ast.unparse(call), f"{path.name}:{call.lineno}"
            assert path.parent.name == "demo", f"{path.name}:{call.lineno}"
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert ast.unparse(keyword.value) == "False"
            if keyword.arg == "use_safetensors":
                assert ast.unparse(keyword.value) == "True"


def test_models_of_the_hub_are_named_with_their_revision() -> None:
    for repository, revision in HUB_MODELS.values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", repository)
        assert re.fullmatch(r"[0-9a-f]{40}", revision)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionXLPipeline"}', encoding="utf-8"
    )
    with pytest.raises(ModelError, match="pickled weights are not loaded; convert them to safetensors"):
        load_pipeline(str(tmp_path))


def test_a_plan_of_any_size_or_depth_is_refused_in_one_line(tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(MAX_PLAN_BYTES + 1)
    with pytest.raises(PlanError, match="larger than"):
        load_plan(large)
    with pytest.raises(PlanError, match="not a plan"):
        parse_plan("[" * 100_000)


def test_a_checkpoint_whose_header_promises_too_much_is_refused(tmp_path: Path) -> None:
    request = request_for(tmp_path)
    (tmp_path / "kept").mkdir()
    file = tmp_path / "kept" / "step-00001.outputs.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    identity = RunIdentity.of(request.plan, "", "", 0, 1.0)
    with pytest.raises(CheckpointError, match="not an intact checkpoint"):
        CheckpointDirectory(tmp_path / "kept", identity, request.plan).find()


def test_ranks_of_one_host_meet_on_loopback_and_nowhere_else() -> None:
    environment = _environment(0, 2, 12345)
    assert environment["MASTER_ADDR"] == LOOPBACK == "127.0.0.1"
    assert environment["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")


def test_the_users_own_interface_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert _environment(0, 2, 12345)["GLOO_SOCKET_IFNAME"] == "eth7"
