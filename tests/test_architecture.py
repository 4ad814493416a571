"""The house keeps its order: imports point up the list of rooms, files stay small, names mean one thing."""

import ast
import functools
import re
from pathlib import Path

import pytest

import dilated_attention_pytorch

ROOT = Path(dilated_attention_pytorch.__file__).parent
TESTS = Path(__file__).parent
PACKAGE = "dilated_attention_pytorch"

# DESIGN section 2, as one strict order; a room imports only rooms above it, lazily or for type checkers too. Where
# the tree refines DESIGN's list: old_paths (import paths of 0.1 and 0.2) reads no room; compiling (what compiled code
# must not trace) serves all; scores stands above problem (a Problem holds a Score); compat and dropout are rooms of
# the definition that the reference needs; memory and merging stand above plans; flops counts the work of plans, for
# the operators and for explanation, which follows attention; testing stands above training, since a contract needs no
# model; the command line and its reports come last.
ORDER = (
    "errors",
    "old_paths",
    "caching",
    "compiling",
    "scores",
    "problem",
    "patterns",
    "compat",
    "dropout",
    "reference",
    "memory",
    "merging",
    "plans",
    "flops",
    "backends",
    "attention",
    "explanation",
    "selection",
    "spaces",
    "orderings",
    "parallel",
    "nn",
    "models",
    "core",
    "testing",
    "training",
    "validation",
    "benchmark",
    "reports",
    "cli",
)
DOOR = ("__init__", "__main__")  # the package's own files may import every room
FILES = sorted(ROOT.rglob("*.py"))
LINE_LIMIT = 500
PROMISED = {"ImprovedDilatedAttention", "ImprovedMultiheadDilatedAttention"}  # names of 0.1 and 0.2, kept for users


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def read(path: Path) -> tuple[str, ast.Module]:
    """A source file's text and tree; no test may change either."""
    text = path.read_text(encoding="utf-8")
    return text, ast.parse(text)


def imported_rooms(tree: ast.AST) -> set[str]:
    """Rooms that a module names in any import statement, wherever it stands."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = (m.split(".")[1] for m in modules if m.startswith(PACKAGE + "."))
    return {name for name in inside if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()}


def uses_door(tree: ast.AST) -> bool:
    """Whether a module imports public names through the package's door instead of from their rooms."""
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == PACKAGE for a in n.names]
    names = [n for n in names if not (ROOT / n).is_dir() and not (ROOT / f"{n}.py").exists() and n != "__version__"]
    plain = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    return bool(names) or PACKAGE in plain


def test_every_room_stands_in_the_order():
    rooms = {room_of(path) for path in FILES} - set(DOOR)
    assert rooms <= set(ORDER), f"give these rooms a place in ORDER: {sorted(rooms - set(ORDER))}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_up(path: Path):
    room, tree = room_of(path), read(path)[1]
    if room in DOOR:
        return
    back = {name for name in imported_rooms(tree) if name != room and ORDER.index(name) > ORDER.index(room)}
    assert not back, f"{room} must not import {sorted(back)}: a room imports only rooms above it"
    if ORDER.index(room) <= ORDER.index("explanation"):
        assert not uses_door(tree), f"{room} must import from the rooms, not through the door"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from dilated_attention_pytorch.plans.base import Plan", {"plans"}),
        ("from dilated_attention_pytorch import plans", {"plans"}),
        ("import dilated_attention_pytorch.nn.cache as c", {"nn"}),
        ("def f():\n    from dilated_attention_pytorch.cli import main", {"cli"}),
        ("if TYPE_CHECKING:\n    from dilated_attention_pytorch.attention import attend", {"attention"}),
        ("import torch\nfrom dilated_attention_pytorch import attend", set()),
    ],
)
def test_the_reader_of_imports_sees_every_kind(source: str, expected: set[str]):
    assert imported_rooms(ast.parse(source)) == expected


def test_the_reader_sees_names_taken_through_the_door():
    assert uses_door(ast.parse("from dilated_attention_pytorch import attend"))
    assert uses_door(ast.parse("import dilated_attention_pytorch"))
    assert not uses_door(ast.parse("from dilated_attention_pytorch import plans"))


def test_no_cycle_between_modules_of_a_room():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if path.name == "__init__.py":
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        nodes, for_types = list(ast.walk(read(path)[1])), set()
        for node in nodes:  # within a room, a name for type checkers only is no cycle
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                for_types |= {part for line in node.body for part in ast.walk(line)}
        graph[".".join(parts)] = {
            n.module.removeprefix(PACKAGE + ".")
            for n in nodes
            if isinstance(n, ast.ImportFrom) and n.module and n not in for_types
        }

    def reach(start: str, here: str, seen: set[str]) -> bool:
        for there in graph.get(here, ()):
            if there == start or (there not in seen and reach(start, there, seen | {there})):
                return True
            seen.add(there)
        return False

    assert [name for name in graph if reach(name, name, set())] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small_and_well_named(path: Path):
    text, tree = read(path)
    assert len(text.splitlines()) <= LINE_LIMIT
    for part in path.relative_to(ROOT).parts:
        name = part.removesuffix(".py")
        assert name not in ("utils", "util", "common", "helpers", "helper", "misc")
        assert not re.search(r"^improved_|_v\d+$|_fixed$|_optimized$|_final$", name), name
    names = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    bad = {n for n in names if re.search(r"^improved_|^Improved|_v\d+$|_fixed$|_optimized$|_final$", n)}
    assert bad <= PROMISED, bad


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_print_no_bare_except_no_notes_to_self(path: Path):
    text, tree = read(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "eval", "exec"), f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.id if isinstance(node.type, ast.Name) else node.type
            if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
                continue  # tidies up and lets the error pass
            assert caught not in (None, "Exception", "BaseException"), f"line {node.lineno}"
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert "/tmp/" not in text
    assert "/home/" not in text


def test_import_brings_little(fresh_interpreters):
    script = (
        "import sys, torch; before = set(sys.modules); import dilated_attention_pytorch;"
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    added = fresh_interpreters.run(script).split()
    heavy = ("matplotlib", "rich", "typer", "click", "safetensors", "hypothesis", "pytest", "torch._dynamo")
    assert [m for m in added if m.split(".")[0] in heavy or m in heavy] == []
    late = ("nn", "models", "core", "testing", "training", "benchmark", "reports", "cli", "parallel")
    assert [m for m in added if m.startswith(PACKAGE + ".") and m.split(".")[1] in late] == []
    assert f"{PACKAGE}.attention" in added


def test_every_public_name_exists_and_is_tested():
    tested = {path: path.read_text() for path in TESTS.rglob("*.py") if path != Path(__file__)}
    everything = "\n".join(tested.values())
    for name in dilated_attention_pytorch.__all__:
        assert hasattr(dilated_attention_pytorch, name)
        assert re.search(rf"\b{name}\b", everything), f"no test names {name}"
    assert list(dilated_attention_pytorch.__all__) == sorted(set(dilated_attention_pytorch.__all__))


def test_public_names_say_what_they_are():
    for name in dilated_attention_pytorch.__all__:
        doc = getattr(dilated_attention_pytorch, name).__doc__
        assert doc, name
        assert doc.strip().splitlines()[0].endswith((".", ":")), f"{name}: the first line is a sentence"


def test_test_files_are_small():
    lines = {str(path.relative_to(TESTS)): len(path.read_text().splitlines()) for path in TESTS.rglob("*.py")}
    assert {name: n for name, n in lines.items() if n > LINE_LIMIT} == {}


def test_package_is_typed():
    assert (ROOT / "py.typed").exists()


def test_test_modules_have_unique_names():
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(names) == len(set(names)), "test modules share a namespace"
