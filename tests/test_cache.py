"""Compiled kernels on disk: a second process compiles nothing, racing ones once, damage is not trusted."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest

import cute_flash
from cute_flash import arch, cache, dispatch, executable
from cute_flash.arch.backward import BackwardProblem
from cute_flash.arch.kernel import Kernel
from cute_flash.arch.problem import KvCache, Problem
from cute_flash.cache import Artifact, CorruptArtifact
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parent.parent
PROBLEM = Problem("float16", 64, 64, lse=False)
A100 = dispatch.EMULATED["sm80"]
CONFIG = TINY.config(PROBLEM, A100)
MADE = Artifact(b"\x7fELF host code", b".version 8.0", b"\x7fELF cubin", {"kernel": "made up", "π": [1]})

# A process that calls attention once, on an emulated GPU, and says what it compiled and imported. The
# kernel is the tiny one, or with "real" the one that ships.
CALL = """
import sys
if "no_compiler" in sys.argv:
    sys.modules["cutlass"] = None
import torch, cute_flash
from cute_flash import arch, executable
if "real" not in sys.argv:
    from tests.tiny import TINY
    arch.load = lambda device, operation: (TINY,)
q = torch.full((2, 3, 2, 64), 2.0).half()
with cute_flash.emulated("sm80"):
    out = cute_flash.flash_attn_func(q, q, q, softmax_scale=0.5)
print(len(executable.compiled), sys.modules.get("cutlass") is not None, out.unique().tolist())
"""


def start(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    script = tmp_path / "call.py"
    script.write_text(CALL)
    told = os.environ | {"PYTHONPATH": str(ROOT), "CUTE_FLASH_CACHE": str(tmp_path / "cache")} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(script), *arguments], env=told, cwd=ROOT, **pipes)


def call(tmp_path: Path, *arguments: str, **environment: str) -> str:
    """What the process says; its errors, where it fails."""
    process = start(tmp_path, *arguments, **environment)
    said, errors = process.communicate()
    return said.strip() if process.returncode == 0 else errors


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.kernel"))


def test_a_second_process_compiles_nothing_and_imports_no_compiler(tmp_path):
    assert call(tmp_path) == "1 True [1.0]"
    assert len(kept(tmp_path)) == 1
    assert call(tmp_path) == "0 False [1.0]"
    assert call(tmp_path, "no_compiler") == "0 False [1.0]"


def test_the_same_for_a_kernel_that_ships(tmp_path):
    assert call(tmp_path, "real") == "1 True [2.0]"
    assert call(tmp_path, "real") == "0 False [2.0]"


def test_racing_processes_compile_once(tmp_path):
    racing = [start(tmp_path) for _ in range(3)]
    said = sorted(process.communicate()[0].strip() for process in racing)
    assert said == ["0 False [1.0]", "0 False [1.0]", "1 True [1.0]"]
    assert [path.suffix for path in sorted(kept(tmp_path)[0].parent.iterdir())] == [".kernel", ".lock"]


def test_a_cache_that_is_off_keeps_nothing(tmp_path):
    off = {"CUTE_FLASH_CACHE": "0", "HOME": str(tmp_path)}
    assert call(tmp_path, **off) == call(tmp_path, **off) == "1 True [1.0]"
    assert not kept(tmp_path) and not (tmp_path / ".cache").exists()


def test_the_cache_is_in_the_home_directory_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("CUTE_FLASH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_directory() == tmp_path / ".cache" / "cute_flash"
    monkeypatch.setenv("CUTE_FLASH_CACHE", "~/elsewhere")
    assert cache.cache_directory() == tmp_path / "elsewhere"


def test_a_bundle_serves_without_the_compiler(tmp_path):
    assert call(tmp_path) == "1 True [1.0]"
    bundle = tmp_path / "bundle"
    kept(tmp_path)[0].parent.rename(bundle)
    empty = {"CUTE_FLASH_CACHE": str(tmp_path / "empty")}
    errors = call(tmp_path, "no_compiler", **empty)
    assert call(tmp_path, "no_compiler", CUTE_FLASH_BUNDLE=str(bundle), **empty) == "0 False [1.0]"
    assert not list((tmp_path / "empty").rglob("*.kernel"))
    for words in (
        "RuntimeError",
        "tests.tiny-",
        "head_dim=64",
        "nvidia-cutlass-dsl, which compiles it, is not installed",
        "python -m cute_flash compile --arch sm80 --dtype float16 --head-dim 64x64 --features",
        "CUTE_FLASH_BUNDLE",
    ):
        assert words in errors


def test_a_bundle_is_found_whatever_compiled_it(tmp_path, monkeypatch):
    """File names hold no version of the compiler; the cache keeps each version's files apart."""
    key = executable.key_of(TINY, PROBLEM, CONFIG, A100)
    tag = cache.compiler_tag()
    monkeypatch.setattr(cache, "versions", lambda: {"nvidia-cutlass-dsl": "4.7.0", "apache-tvm-ffi": None})
    assert executable.key_of(TINY, PROBLEM, CONFIG, A100) == key
    assert cache.compiler_tag() == "dsl4.7.0-ffiNone" != tag


def test_the_key_holds_every_source(tmp_path):
    """A kernel compiled from other sources is another kernel."""
    source = tmp_path / "kernel.py"
    source.write_text("a = 1")
    before = cache.sources_digest(source)
    source.write_text("a = 2")
    cache.sources_digest.cache_clear()
    assert cache.sources_digest(source) != before
    names = [cache.key_of("k", "sources", "part"), cache.key_of("k", "other", "part"),
             cache.key_of("k", "sources", "other"), cache.key_of("j", "sources", "part")]  # fmt: skip
    assert len(set(names)) == 4 and names[0].startswith("k-")
    cache.sources_digest.cache_clear()


LOWER, OUTER = "lower/__init__.py", "outer/__init__.py"
KERNELS = ("lower.forward", "upper.forward.kernel", "upper.backward", "outer.kernel")


@pytest.mark.parametrize(
    "changed, stale",
    {
        "__init__.py": set(),
        "problem.py": {"lower.forward", "upper.backward", "outer.kernel"},
        "common/mask.py": {"lower.forward", "upper.forward.kernel", "outer.kernel"},
        "common/keys.py": {"upper.backward"},
        "common/rows.py": {"lower.forward", "upper.backward", "outer.kernel"},  # as problem.py imports it
        "common/unused.py": set(),
        "lower/mma.py": {"lower.forward", "outer.kernel"},
        "lower/tuning.py": {"lower.forward", "outer.kernel"},
        LOWER: {"outer.kernel"},  # which imports the package itself
        "upper/tuning.py": {"upper.forward.kernel", "upper.backward"},
        "upper/forward/kernel.py": {"upper.forward.kernel"},
        "upper/forward/__init__.py": {"outer.kernel"},
        "upper/backward.py": {"upper.backward"},
        OUTER: set(),
    }.items(),
)
def test_a_change_concerns_the_kernels_that_can_import_it(tmp_path, monkeypatch, changed, stale):
    """And no others: where a package says which kernels it has, that is no part of them."""
    sources = {
        "__init__.py": "from .problem import Problem",
        "problem.py": "def f():\n    from .common.rows import Rows",
        "common/mask.py": "",
        "common/keys.py": "",
        "common/rows.py": "",
        "common/unused.py": "from .mask import Mask",
        LOWER: "from . import forward, tuning",
        "lower/forward.py": "from ..common.mask import Mask\nfrom .mma import product\nfrom . import tuning\n"
        "from ..problem import Problem",
        "lower/mma.py": "",
        "lower/tuning.py": "",
        "upper/__init__.py": "from ..lower import Forward as LowerForward",
        "upper/tuning.py": "",
        "upper/forward/__init__.py": "OPERATION = 0",
        "upper/forward/kernel.py": "from ...common import (\n    mask,\n)\nfrom ..tuning import Config",
        "upper/backward.py": "from .tuning import Config as Forward, Row\nfrom ..common.keys import Keys\n"
        "from ..problem import Operands",
        OUTER: "",
        "outer/kernel.py": "from .. import lower\nfrom ..lower import mma\nfrom ..common.mask import Mask\n"
        "from ..upper.forward import OPERATION",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cache.arch, "__file__", str(tmp_path / "__init__.py"))

    def digests():
        cache.sources_digest.cache_clear()
        return {module: cache.sources_digest(module=module) for module in (*KERNELS, None)}

    before = digests()
    (tmp_path / changed).write_text(sources[changed] + "\n")
    after = digests()
    cache.sources_digest.cache_clear()
    assert {module for module in before if before[module] != after[module]} == stale | {None}


def shipped() -> dict[str, Kernel]:
    """Every kernel, by name."""
    trees = (importlib.import_module(f"{arch.__name__}.{tree}") for tree in ("sm80", "sm90", "sm100"))
    found = [value for tree in trees for value in vars(tree).values() if isinstance(value, Kernel)]
    return {kernel.name: kernel for kernel in found}


def test_imports_are_found_wherever_they_stand():
    """As Python's own parser finds them, within classes and functions too; none is absolute."""
    root = Path(arch.__file__).parent
    for path in root.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        absolute = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        absolute += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        assert not [name for name in absolute if name.split(".")[0] == "cute_flash"], path
        relative = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
        names = sum(len(node.names) for node in relative)
        found = cache.imported(path)
        assert bool(found) == bool(names), path
        for node in relative:
            package = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            places = [package.with_suffix(".py"), package / "__init__.py"]
            places += [package / f"{alias.name}.py" for alias in node.names]
            places += [package / alias.name / "__init__.py" for alias in node.names]
            assert found & set(places), (path, node.module)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_what_a_kernel_is_compiled_from_is_in_its_key(name):
    """The files of whatever its modules have in hand: classes, functions and modules."""
    kernel = shipped()[name]
    root = Path(arch.__file__).parent
    module = kernel.launches.partition(":")[0]
    assert executable.sources_of(kernel) == cache.sources_digest(
        Path(executable.__file__), module=module[1:]
    )
    found = set(cache.sources(root, module[1:]))
    for path in found - {root / "__init__.py"}:
        dotted = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for value in vars(importlib.import_module(f"{arch.__name__}.{dotted}")).values():
            if inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value):
                owner = sys.modules[getattr(value, "__module__", value.__name__)]
                file = Path(getattr(owner, "__file__", None) or os.devnull)
                assert file in found or not file.is_relative_to(root), (path, value)


def parts_of(value: object) -> Iterator[object]:
    """A problem or a config, and all that it is made of."""
    yield value
    inside = vars(value).values() if is_dataclass(value) else value if isinstance(value, tuple) else ()
    for part in inside:
        yield from parts_of(part)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tree", ["sm80", "sm90", "sm100"])
def test_what_a_problem_and_a_config_are_made_of_is_in_the_key(tree, backward):
    """Their classes, whose methods a kernel calls without importing them."""
    device, root = dispatch.EMULATED[tree], Path(arch.__file__).parent
    rules = {"mask": cute_flash.Causal(), "score": cute_flash.Softcap(30.0)}
    problem = cute_flash.supports("bfloat16", 64, device=tree, **rules).problem
    problem = BackwardProblem(problem) if backward else replace(problem, cache=KvCache(16), seqused_k=True)
    classes = set()
    for step in dispatch.steps(problem, device):
        found = set(cache.sources(root, step.kernel.launches.partition(":")[0][1:]))
        for part in (*parts_of(step.problem), *parts_of(step.config)):
            file = Path(getattr(sys.modules[type(part).__module__], "__file__", None) or os.devnull)
            assert file in found or not file.is_relative_to(root), (step.kernel.name, type(part))
            classes.add(type(part).__name__)
    assert {"Problem", "Expression", "Config"} <= classes


def test_what_is_read_is_what_was_written(tmp_path):
    cache.write(tmp_path / "k.kernel", MADE)
    assert cache.read(tmp_path / "k.kernel") == MADE
    assert [path.name for path in tmp_path.iterdir()] == ["k.kernel"]
    with zipfile.ZipFile(tmp_path / "k.kernel") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_writing_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def failing(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(cache.os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        cache.write(tmp_path / "k.kernel", MADE)
    assert not list(tmp_path.iterdir())


def without(path: Path, member: str) -> None:
    """Leave a member out of a zip."""
    with zipfile.ZipFile(path) as archive:
        data = {name: archive.read(name) for name in archive.namelist() if name != member}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in data.items():
            archive.writestr(name, content)


def replaced(path: Path, member: str, content: bytes) -> None:
    """Replace a member of a zip; the zip itself stays right."""
    without(path, member)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, content)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "no_zip": lambda path: path.write_bytes(b"x" * 1000),
    "bit_flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"host code", b"host cope")),
    "member_missing": lambda path: without(path, "kernel.cubin"),
    "member_replaced": lambda path: replaced(path, "kernel.o", b"\x7fELF other"),
    "member_added": lambda path: replaced(path, "kernel.sass", b"more"),
    "sums_missing": lambda path: without(path, "SHA256SUMS"),
    "sums_garbled": lambda path: replaced(path, "SHA256SUMS", b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed(tmp_path, monkeypatch, damage):
    """It is compiled again, with a warning, and the file replaced."""
    monkeypatch.setenv("CUTE_FLASH_CACHE", str(tmp_path))
    built = []

    def build():
        built.append(1)
        return MADE

    assert cache.get("k", build) == cache.get("k", build) == MADE and len(built) == 1
    path = tmp_path / cache.compiler_tag() / "k.kernel"
    DAMAGE[damage](path)
    with pytest.raises(CorruptArtifact, match="k.kernel"):
        cache.read(path)
    with pytest.warns(UserWarning, match="corrupt kernel file ignored: .*k.kernel"):
        assert cache.get("k", build) == MADE
    assert len(built) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get("k", build) == MADE
    assert len(built) == 2


def test_a_damaged_bundle_is_not_trusted_either(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTE_FLASH_CACHE", "0")
    monkeypatch.setenv("CUTE_FLASH_BUNDLE", str(tmp_path))
    other = MADE._replace(ptx=b"from the bundle")
    cache.write(tmp_path / "k.kernel", other)
    assert cache.get("k", lambda: MADE) == other
    DAMAGE["truncated"](tmp_path / "k.kernel")
    with pytest.warns(UserWarning, match="corrupt kernel file ignored"):
        assert cache.get("k", lambda: MADE) == MADE


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUTE_FLASH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="kernels are not kept: the cache .* cannot be written") as found:
        assert cache.get("k", lambda: MADE) == MADE
    assert len(found) == 1
