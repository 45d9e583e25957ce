"""Compiled kernels on disk: one file per kernel, looked up in a bundle, then in the user's cache.

    CUTE_FLASH_BUNDLE=DIR   made by `python -m cute_flash compile`; read-only, searched first
    CUTE_FLASH_CACHE=DIR    default ~/.cache/cute_flash; 0 turns the cache off

A file is a stored zip of the host object, the PTX, the cubin, a description and the SHA-256 of each. It
is written beside its final name and renamed, under a lock, so that of racing processes one compiles. A
file that does not match its sums is never used: it is compiled again, with a warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from . import arch

SUFFIX = ".kernel"
_OFF = "0"
_ABSENT = (FileNotFoundError, NotADirectoryError)
_SUMS = "SHA256SUMS"
# `from ..module import names`: the module and the names
_RELATIVE = re.compile(r"^\s*from \.+([\w.]*) import (\([^)]*\)|.*)", re.MULTILINE)


class Artifact(NamedTuple):
    """A compiled kernel. object: its host code with the cubin inside, a relocatable ELF file."""

    object: bytes
    ptx: bytes
    cubin: bytes
    description: dict[str, Any]

    def files(self) -> dict[str, bytes]:
        """Name of each part's file -> its content."""
        return {
            "kernel.o": self.object,
            "kernel.ptx": self.ptx,
            "kernel.cubin": self.cubin,
            "kernel.json": json.dumps(self.description, indent=1, ensure_ascii=False).encode(),
        }


class CorruptArtifact(Exception):
    """A file that is not what was written."""


def key_of(kernel: str, sources: str, *parts: Any) -> str:
    """The name of a kernel's file: readable, then a digest of the parts and the sources.

    Versions of the compiler are not in it: a bundle serves where no compiler is installed.
    """
    digest = hashlib.sha256("\0".join([kernel, sources, *map(repr, parts)]).encode())
    return f"{kernel}-{digest.hexdigest()[:24]}"


@functools.cache
def sources_digest(*files: Path, tree: str | None = None) -> str:
    """Digest of everything that a compiled kernel comes from: `files`, and of the kernels' sources those
    that a kernel of `tree` can import, or all.
    """
    root = Path(arch.__file__).parent
    named = [(str(path.relative_to(root)), path) for path in sources(root, tree)]
    digest = hashlib.sha256()
    for name, path in (*named, *((path.name, path) for path in files)):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def sources(root: Path, tree: str | None = None) -> list[Path]:
    """The files below `root` that a kernel of `tree` can import: what all trees share, its own, and those of
    the trees that its own import from. "common" has the kernels that are in no tree; None stands for all.

    A tree's `__init__` also lists kernels of other trees, each of which is compiled under its own name.
    """
    if tree is None:
        return sorted(root.rglob("*.py"))
    found = {*root.glob("*.py"), *(root / "common").rglob("*.py")}
    trees = [tree]
    for name in trees:  # which grows
        files = set((root / name).rglob("*.py"))
        for path in files - {root / name / "__init__.py"}:
            modules = _RELATIVE.findall(path.read_text())
            named = {word for match in modules for word in re.findall(r"\w+", " ".join(match))}
            trees += [other for other in sorted(named) if other not in trees and (root / other).is_dir()]
        found |= files
    return sorted(found)


def get(key: str, build: Callable[[], Artifact]) -> Artifact:
    """The kernel `key` from the bundle, from the cache, or from `build`, whose result is then kept."""
    bundle, root = os.environ.get("CUTE_FLASH_BUNDLE"), cache_directory()
    found = _read_if_whole(Path(bundle) / (key + SUFFIX)) if bundle else None
    if found is not None:
        return found
    if root is None:
        return build()
    path = root / compiler_tag() / (key + SUFFIX)
    found = _read_if_whole(path)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115, closed by `_locked`
    except OSError as error:
        warnings.warn(f"kernels are not kept: the cache {root} cannot be written ({error})", stacklevel=2)
        return build()
    with _locked(lock):
        found = _read_if_whole(path)  # another process may have been faster
        if found is None:
            found = build()
            write(path, found)
    return found


def write(path: Path, artifact: Artifact) -> None:
    """Write a kernel's file; it appears whole or not at all."""
    files = artifact.files()
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, data in {**files, _SUMS: sums.encode()}.items():
                archive.writestr(name, data)
        os.chmod(temporary, 0o644)  # mkstemp's is 0600; bundles are there to be shared
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: Path) -> Artifact:
    """A kernel's file, checked; CorruptArtifact where a part is missing or does not match its sum."""
    try:
        with zipfile.ZipFile(path) as archive:
            data = {name: archive.read(name) for name in archive.namelist()}
        sums = {name: digest for digest, name in (s.split() for s in data.pop(_SUMS).decode().splitlines())}
        actual = {name: hashlib.sha256(part).hexdigest() for name, part in data.items()}
        if sums != actual or not data:
            raise CorruptArtifact(f"{path}: the parts do not match {_SUMS}")
        return Artifact(
            data["kernel.o"], data["kernel.ptx"], data["kernel.cubin"], json.loads(data["kernel.json"])
        )
    except _ABSENT:
        raise
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise CorruptArtifact(f"{path}: {error}") from error


def cache_directory() -> Path | None:
    """Where compiled kernels are kept, or None where they are not."""
    named = os.environ.get("CUTE_FLASH_CACHE", "")
    if named == _OFF:
        return None
    return Path(named).expanduser() if named else Path.home() / ".cache" / "cute_flash"


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of what compiles and runs kernels; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def compiler_tag() -> str:
    """The part of the cache that the installed compiler fills."""
    return "-".join(f"{name.rpartition('-')[2]}{version}" for name, version in versions().items())


def _read_if_whole(path: Path) -> Artifact | None:
    try:
        return read(path)
    except _ABSENT:
        return None
    except CorruptArtifact as error:
        warnings.warn(f"corrupt kernel file ignored: {error}", stacklevel=3)
        return None


@contextlib.contextmanager
def _locked(file: Any) -> Iterator[None]:
    """Hold the lock until the block ends or the process dies."""
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
