"""The package as its users have it: a wheel, made from the sdist, in an environment outside the tree.

The environment borrows the packages that are installed for the tests; the source tree is not among them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import cute_flash
from cute_flash import dispatch, executable, precompile

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "__pycache__", "*.pyc", "*.egg-info", ".pytest_cache", ".ruff_cache",
    ".hypothesis",
)
FOLDERS = {"arch": "cute_flash/arch", "cute_flash": "cute_flash"}  # in the tree -> in the wheel

# Attention on every tree, what the command line prints, and what was compiled for it. argv: a bundle.
COMPILE = """
import contextlib, io, sys, torch, cute_flash
from cute_flash.__main__ import main
print(cute_flash.__file__, cute_flash.__version__)
print(main(["compile", sys.argv[1], "--arch", "sm80", "--dtype", "float16", "--head-dim", "64",
            "--features", "dense"]))
with contextlib.redirect_stdout(io.StringIO()) as said:
    main(["features"])
q, k, v = torch.randn(3, 1, 40, 1, 64).half()
exact = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
for arch in ("sm80", "sm90", "sm100"):
    assert f" {arch} |" in said.getvalue() and cute_flash.supports(q.dtype, 64, device=arch)
    with cute_flash.emulated(arch):
        out = cute_flash.flash_attn_func(q, k, v)
    torch.testing.assert_close(out.double(), exact.transpose(1, 2), atol=2e-3, rtol=0)
    print(arch, cute_flash.supports(q.dtype, 64, device=arch).kernel.name)
"""

# The same from a bundle, where there is no compiler.
SERVE = """
import sys
sys.modules["cutlass"] = None
import torch, cute_flash
from cute_flash import executable
q = torch.randn(1, 40, 1, 64).half()
with cute_flash.emulated("sm80"):
    out = cute_flash.flash_attn_func(q, q, torch.ones_like(q))
print(len(executable.compiled), (out - 1).abs().max().item() < 2e-3)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the source tree, with a module that an earlier build left behind."""
    copy = Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("install") / "tree", ignore=NOT_SHIPPED))
    stale = copy / "build" / "lib" / "cute_flash" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    return copy


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    """The source distribution, unpacked."""
    with tarfile.open(built("sdist", tree)) as archive:
        archive.extractall(tree.parent)
    return tree.parent / f"cute_flash-{cute_flash.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    """The wheel that the source distribution gives."""
    return built("wheel", sdist)


@pytest.fixture(scope="module")
def python(wheel) -> Path:
    """The interpreter of a new environment in which the wheel is installed."""
    where = wheel.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", where], check=True)
    packages = sysconfig.get_path("purelib", "venv", {"base": where, "platbase": where})
    install = ["install", "--no-deps", "--no-index", "--quiet", "--target", packages, wheel]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *install], check=True)
    borrowed = [path for path in sys.path if "site-packages" in path]
    Path(packages, "borrowed.pth").write_text("\n".join(borrowed))
    return where / "bin" / "python"


@pytest.fixture(scope="module")
def said(python, tmp_path_factory) -> list[str]:
    """What COMPILE prints in that environment; the bundle that it makes lies at `bundle`."""
    cache = tmp_path_factory.mktemp("cache")
    return said_by(python, "-c", COMPILE, str(bundle(python)), CUTE_FLASH_CACHE=str(cache))


def bundle(python: Path) -> Path:
    return python.parent / "bundle"


def built(kind: str, source: Path) -> Path:
    """The "sdist" or "wheel" that a source tree gives, without a network."""
    made = source.with_name(f"{source.name} {kind}")
    made.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(made)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = made.iterdir()
    return path


def said_by(python: Path, *arguments: str, **environment: str) -> list[str]:
    """The lines that the new environment's Python prints, started outside the tree."""
    ours = ("PYTHON", "CUTE_FLASH")
    told = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | environment
    done = subprocess.run([python, *arguments], cwd=python.parent, env=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def files(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files below a folder, without what building adds."""
    names = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    added = ("build/", "cute_flash.egg-info/", "PKG-INFO", "setup.cfg")
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(added)}


def modules(wheel: Path) -> dict[str, bytes]:
    """Name -> content of what a wheel has beside its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_file_of_the_package(tree, wheel):
    """A folder that the rule for packages does not find is missed here."""
    expected = {f"{theirs}/{name}": content for ours, theirs in FOLDERS.items()
                for name, content in files(tree / ours).items()}  # fmt: skip
    assert {"cute_flash/py.typed", "cute_flash/arch/py.typed"} <= expected.keys()
    assert modules(wheel) == expected


def test_the_sdist_is_the_whole_tree(tree, sdist):
    """So it passes the same tests."""
    assert files(sdist) == files(tree)


def test_the_tree_gives_the_same_wheel(tree, wheel):
    direct = built("wheel", tree)
    platform = "py3-none-manylinux_2_28_x86_64"
    assert direct.name == wheel.name == f"cute_flash-{cute_flash.__version__}-{platform}.whl"
    assert modules(direct) == modules(wheel)


def test_what_the_wheel_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" in name]
        about = {Path(name).name: archive.read(name).decode() for name in names}
    assert about["LICENSE"] == (ROOT / "LICENSE").read_text() and "Version 2.0" in about["LICENSE"]
    assert "\nLicense-Expression: Apache-2.0\n" in about["METADATA"]


def test_an_installed_wheel_computes(python, said):
    """On every tree, with kernels that it compiled."""
    assert not said[0].startswith(str(ROOT)) and str(python.parents[1]) in said[0]
    assert said[-3:] == ["sm80 sm80.forward", "sm90 sm90.forward", "sm100 sm100.forward"]
    assert said_by(python, "-m", "cute_flash", "--version") == [f"cute_flash {cute_flash.__version__}"]


def test_its_bundle_serves_without_the_compiler(python, said):
    told = {"CUTE_FLASH_BUNDLE": str(bundle(python)), "CUTE_FLASH_CACHE": "0"}
    assert said_by(python, "-c", SERVE, **told) == ["0 True"]


def test_its_bundle_is_the_tree_s(python, said):
    """Kernels have the same names whoever compiled them: bundles move between a wheel and its clone."""
    device = dispatch.EMULATED["sm80"]
    problem = precompile.problem_of("float16", (64, 64), ["dense"])
    keys = {executable.key_of(*step.compiled, device) for step in dispatch.steps(problem, device)}
    assert keys == {path.stem for path in bundle(python).glob("*.kernel")}
