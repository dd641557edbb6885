"""The house's floors: imports point downward only, in every file, lazy imports included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "minima"
FLOORS = {
    "cli": 9, "__main__": 9, "law": 8, "cluster": 7, "stages": 6, "evaluation": 5, "engine": 4, "pruning": 4,
    "data": 4, "planning": 3, "report": 3, "recipe": 2, "models": 1, "losses": 1, "assets": 1, "batch": 1,
    "errors": 0, "console": 0, "disk": 0, "disk_errors": 0, "launcher": 0, "nodes": 0, "triton_driver": 0,
    "cpu_products": 0, "__init__": -1,
}  # fmt: skip
BESIDE = {
    ("__main__", "cli"),
    ("launcher", "errors"),
    ("launcher", "nodes"),
    ("nodes", "errors"),
    ("disk", "errors"),
    ("disk", "disk_errors"),
    ("disk_errors", "errors"),
    ("launcher", "disk"),
    ("console", "errors"),
    ("losses", "batch"),
    ("models", "batch"),
}  # same floor, one way
NO_TORCH = [
    "minima.cli", "minima.errors", "minima.launcher", "minima.models.shape", "minima.recipe.loading",
    "minima.planning.arithmetic", "minima.planning.dry_run", "minima.report.run_table", "minima.stages.lock",
    "minima.stages.manifest", "minima.stages.driver.pipeline", "minima.stages.context", "minima.stages.preview.dry_run",
    "minima.stages.running", "minima.stages.preview.plan_command", "minima.pruning.target",
]  # fmt: skip


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(source: str, module: str, is_package: bool = False) -> list[str]:
    """Full names of what a file imports from minima, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base if is_package else base[:-1]
            base = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found += [origin] if origin != "minima" else []
            found += [f"{origin}.{alias.name}" for alias in node.names]  # a module, or a name in one
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            first = node.args[0]
            text = first.value if isinstance(first, ast.Constant) else getattr(first, "values", [None])[0]
            found.append(str(getattr(text, "value", text)).rstrip("."))
    return [name for name in found if name == "minima" or name.startswith("minima.")]


def wrong_arrows(module: str, names: list[str]) -> list[str]:
    own = room_of(module)
    wrong = []
    for name in names:
        other = room_of(name)
        if other == own or other not in FLOORS:  # names like __version__ live in the package itself
            continue
        if FLOORS[other] >= FLOORS[own] and (own, other) not in BESIDE:
            wrong.append(f"{module} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})")
    return wrong


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)] = path
    return found


def test_every_room_has_a_floor():
    assert {room_of(module) for module in modules()} <= set(FLOORS)


def test_imports_point_downward():
    wrong = []
    for module, path in modules().items():
        names = imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
        wrong += wrong_arrows(module, names)
    assert not wrong, "\n".join(wrong)


def test_no_circle_between_files():
    files = modules()
    edges = {}
    for module, path in files.items():
        names = imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
        edges[module] = {name for name in names if name in files and name != module}
    assert circle(edges) is None


def circle(edges: dict[str, set[str]]) -> str | None:
    """The first way from a file back to itself."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> str | None:
        if module in trail:
            return " -> ".join([*trail, module])
        if module not in done:
            for other in sorted(edges[module]):
                if found := walk(other, [*trail, module]):
                    return found
            done.add(module)
        return None

    return next((found for module in edges if (found := walk(module, []))), None)


def test_the_check_sees_a_circle_through_a_module_that_is_imported_by_its_name():
    names = imported("from minima.engine import loop", "minima.engine.metrics")
    edges = {
        "minima.engine.metrics": {*names} & {"minima.engine.loop"},
        "minima.engine.loop": {"minima.engine.metrics"},
    }
    assert circle(edges) == "minima.engine.metrics -> minima.engine.loop -> minima.engine.metrics"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("minima.losses.x", "from minima.engine.loop import train"),
        ("minima.engine.x", "def f():\n    from minima.pruning import masks"),
        ("minima.data.x", "from ..stages import lock"),
        ("minima.recipe.x", "import minima.planning.arithmetic"),
        ("minima.errors", "from minima import cli"),
        ("minima.report.x", "import importlib\nimportlib.import_module('minima.planning.dry_run')"),
    ],
)
def test_the_check_sees_wrong_arrows(module, source):
    assert wrong_arrows(module, imported(source, module))


def test_downward_and_own_imports_are_allowed():
    source = "from minima.errors import MinimaError\nfrom minima.stages.lock import run_lock\nfrom minima import models"
    assert not wrong_arrows("minima.stages.x", imported(source, "minima.stages.x"))


def test_only_the_launcher_reads_the_environment():
    readers = [
        str(path.relative_to(PACKAGE))
        for path in modules().values()
        if path.name != "launcher.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.Name)
        and (getattr(node, "attr", None) or getattr(node, "id", "")) in ("environ", "getenv")
    ]
    assert not readers


def test_what_a_login_node_needs_imports_no_torch():
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "heavy = {'torch', 'deepspeed', 'transformers'} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code, *NO_TORCH], check=True)


def test_files_stay_readable():
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in modules().items()}
    assert not {name: count for name, count in lines.items() if count > 300}
