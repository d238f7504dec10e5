"""Imports point one way: tree <- reference <- runtime <- kernels <- collectives <- ops <- layers <- integrations."""

import ast
from pathlib import Path

import pytest

import tpinv

PACKAGE = Path(tpinv.__file__).parent
# A module may import its own layer and those to the left; kernels know no process group. testing checks anyone and is used
# only on top; optim uses exact kernels and the integer side of collectives.
ALLOWED = {
    "tree": set(),
    "contract": {"tree"},
    "reference": {"tree", "contract"},
    "runtime": {"tree", "contract"},
    "kernels": {"tree", "contract", "reference", "runtime"},
    "collectives": {"tree", "contract", "reference", "runtime", "kernels"},
    "ops": {"tree", "contract", "reference", "runtime", "kernels", "collectives"},
    "functional": {"ops"},
    "sharding": {"tree", "contract", "reference", "collectives"},
    "layers": {"tree", "contract", "reference", "collectives", "ops", "functional", "sharding", "state_dict"},
    "state_dict": {"sharding", "guards"},
    "guards": {"sharding"},
    "replicas": {"collectives", "sharding"},
    "optim": {"tree", "contract", "reference", "kernels", "collectives", "sharding", "replicas"},
    "warmup": {"layers"},
    "inference": {"tree", "contract", "reference", "runtime", "kernels", "collectives", "ops", "functional"},
    "testing": {"tree", "contract", "reference"},
    "diff": {"tree", "contract", "reference", "testing"},
    "integrations": {
        "",
        "tree",
        "contract",
        "reference",
        "runtime",
        "collectives",
        "ops",
        "functional",
        "layers",
        "optim",
        "sharding",
        "inference",
        "testing",
    },
    "__init__": {
        "tree",
        "contract",
        "reference",
        "collectives",
        "ops",
        "functional",
        "layers",
        "optim",
        "sharding",
        "state_dict",
        "warmup",
    },
}


def source_files() -> dict[str, Path]:
    files = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    integrations = PACKAGE.parent / "integrations"  # installed as tpinv.integrations
    return files | {str(path.relative_to(PACKAGE.parent)): path for path in integrations.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(name: str) -> str:
    """tpinv.collectives.group.resolve -> collectives; tpinv.ReductionTree -> "" (the top level)."""
    part = name.split(".")[1]
    return part if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists() or part == "integrations" else ""


@pytest.mark.parametrize("name", sorted(source_files()))
def test_imports_point_one_way(name):
    layer = name.split("/")[0].removesuffix(".py")
    if layer in ("cli", "__main__"):  # on top of everything
        return
    if layer == "harness":  # what commands run: on top of everything but them
        assert not any(full.startswith("tpinv.cli") for full in imported(source_files()[name]))
        return
    layers = {layer_of(full) for full in imported(source_files()[name]) if full.split(".")[0] == "tpinv"}
    assert layers - {layer} <= ALLOWED[layer]


def test_what_the_lower_layers_know():
    for name, path in source_files().items():
        modules = {full.split(".")[0] for full in imported(path)}
        full = imported(path)
        if name == "tree.py":
            assert modules <= {"collections", "dataclasses", "functools", "typing"}
        if name.startswith(("reference/", "runtime/", "kernels/")):
            assert not any(module.startswith("torch.distributed") for module in full), f"{name} knows process groups"
        if not name.startswith(("integrations", "harness", "cli")):
            assert not modules & {"megatron", "torchtitan", "transformers", "vllm"}, f"{name} knows a framework"


def test_every_layer_is_listed():
    assert {name.split("/")[0].removesuffix(".py") for name in source_files()} - {"cli", "harness", "__main__"} <= set(ALLOWED)
