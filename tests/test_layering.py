"""The wings of the package import downwards only, and every module stays small, tests included.

The order is that of `docs/architecture.md`. Within a wing any order will do as long as there is no
circle. `TYPE_CHECKING` imports count: a name that only a type checker needs is an arrow, too.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sae_lens_route"
LAYERS = [
    {"errors", "records"},
    {"saes", "models"},
    {"splice"},
    {"files", "memory"},
    {"config"},
    {"data"},
    {"training"},
    {"evals"},
    {"synthetic"},
    {"features"},
    {"steering"},
    {"dashboards"},
    {"plots"},
    {"paper"},
    {"demo"},
    {"cli"},
]
FACE = {"", "__main__", "registration_hook"}  # the package's public face may name everything
MAX_LINES = 400


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def wing(module):
    """The folder of a room; `config.py`, `config_fields.py` and `config_sweep.py` are one wing."""
    return re.split(r"[._]", module)[0]


def imports_of(path):
    """Modules of the package that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_lens_route"):
            origin = node.module.removeprefix("sae_lens_route").removeprefix(".")
            submodules = {f"{origin}.{alias.name}".strip(".") for alias in node.names}
            found |= submodules & MODULES.keys() or {origin}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {n.removeprefix("sae_lens_route.") for n in names if "sae_lens_route." in n}
    return found


ARROWS = {module: imports_of(path) for module, path in MODULES.items() if module not in FACE}


def layer_of(module):
    layers = [i for i, wings in enumerate(LAYERS) if wing(module) in wings]
    assert layers, f"{module} is in no layer: add its wing to LAYERS and to docs/architecture.md"
    return layers[0]


@pytest.mark.parametrize("module", ARROWS)
def test_imports_point_downwards(module):
    for other in ARROWS[module]:
        same_wing = wing(other) == wing(module)
        assert same_wing or layer_of(other) < layer_of(module), f"{module} imports {other}"


def test_there_is_no_circle():
    rooms = {m: {o for o in others if o in ARROWS and o != m} for m, others in ARROWS.items()}
    list(TopologicalSorter(rooms).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("folder", ["sae_lens_route", "tests", "benchmarks", "scripts", "examples"])
def test_rooms_are_small(folder):
    n_lines = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert n_lines
    assert {path: n for path, n in n_lines.items() if n > MAX_LINES} == {}


def test_no_private_name_crosses_rooms():
    crossing = [
        f"{module} imports {alias.name}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_lens_route")
        for alias in node.names
        if alias.name.startswith("_") and alias.name != "__version__"
    ]
    assert not crossing


def test_no_room_is_named_for_leftovers():
    assert not {"utils", "common", "helpers", "misc"} & {p.stem for p in MODULES.values()}
