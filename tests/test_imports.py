"""Who may import whom: the table of the layout, held against every import statement, lazy ones too."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import distri

ROOT = Path(distri.__file__).parent
MAX_LINES = 600

CORE = {"distri.core", "distri.errors"}
BACKEND = CORE | {"distri.backends.base", "distri.nn", "torch"}
DRIVER = CORE | {"distri.backends.base", "distri.config", "distri.models", "distri.nn", "distri.simulator"}

MAY_IMPORT = {
    "distri.core": {"distri.errors", "networkx", "numpy"},
    "distri.config": CORE | {"distri.simulator", "pydantic", "yaml"},
    "distri.search": CORE | {"distri.config", "distri.simulator", "numpy"},  # docs/decisions/0010
    "distri.simulator": CORE | {"networkx", "numpy", "scipy", "simpy"},
    "distri.nn": CORE | {"torch"},
    "distri.models": CORE
    | {
        "distri.nn",
        "torch",
        "diffusers",
        "transformers",
        "tokenizers",
        "safetensors",
        "peft",
        "numpy",
        "PIL",
        "tqdm",
    },
    "distri.backends.base": CORE,
    "distri.backends.in_process": BACKEND,
    "distri.backends.torch_distributed": BACKEND,
    "distri.backends.simulated": BACKEND | {"distri.simulator"},
}
# What drives a run on a backend; a concrete backend is asked for by its name, which `pipeline.open_backend` resolves.
DRIVERS = (
    "bench",
    "checkpoint",
    "comparison",
    "contact_sheet",
    "decoding",
    "evaluation",
    "executor",
    "launch",
    "outputs",
    "pipeline",
    "precautions",
    "probe",
    "request",
    "profiler",
    "quality",
    "ranks",
    "recorded",
    "sampling",
    "session",
    "tracing",
)
DRIVER |= {f"distri.{name}" for name in DRIVERS} | {"torch", "numpy", "PIL", "safetensors", "skimage"}
MAY_IMPORT |= {f"distri.{name}": DRIVER for name in DRIVERS}
MAY_IMPORT["distri.pipeline"] = DRIVER | {"distri.backends"}
MAY_IMPORT["distri.profiler"] = DRIVER | {
    "distri.backends.torch_distributed"
}  # it measures that very backend's wires
MAY_IMPORT["distri.evaluation"] = DRIVER | {"lpips"}
MAY_IMPORT |= {"distri.errors": set(), "distri.cli": {"distri", "click", "rich", "PIL"}}
MAY_IMPORT |= {"distri": {"distri.pipeline"}, "distri.__main__": {"distri.cli"}, "distri.backends": set()}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported_by(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else str(node.module)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def home_of(name: str) -> str:
    return max((package for package in MAY_IMPORT if is_within(name, package)), key=len)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_its_package_may(name: str) -> None:
    home = home_of(name)
    allowed = MAY_IMPORT[home] | ({home} if home != "distri" else set())
    for imported in imported_by(FILES[name]):
        if imported.split(".")[0] in sys.stdlib_module_names or imported == "distri":
            continue
        assert any(is_within(imported, package) for package in allowed), f"{name} imports {imported}"


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_so_long_that_it_must_hold_several_ideas(name: str) -> None:
    assert FILES[name].read_text(encoding="utf-8").count("\n") < MAX_LINES
