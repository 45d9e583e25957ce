"""Compiled kernels on disk: one file per kernel, looked up in a bundle, then in the user's cache.

    CUTE_FLASH_BUNDLE=DIR   made by `python -m cute_flash compile`; read-only, searched first
    CUTE_FLASH_CACHE=DIR    default $XDG_CACHE_HOME/cute_flash or ~/.cache/cute_flash; 0 turns the cache off

A file is a stored zip of the host object, the PTX, the cubin, a description and the SHA-256 of each. It
is written beside its final name and renamed, under a lock, so that of racing processes one compiles. A
file that does not match its sums is never used: it is compiled again, with a warning. Nor is one that
others could have written (trust.py). Whatever a directory cannot do is a warning, and never fails a call.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

from . import arch, trust

SUFFIX = ".kernel"
_LOCK, _PART = ".lock", ".part"  # beside a kernel's file: who compiles it, what is not yet whole
_OFF = "0"
_ABSENT = (FileNotFoundError, NotADirectoryError)
_SUMS = "SHA256SUMS"
FOLDER_MODE = 0o755  # whatever the umask: what others can write is not loaded from
_PATIENCE = 120.0  # seconds to wait for another process that compiles the same kernel
# `from ..module import names`: the dots, the module and the names
_RELATIVE = re.compile(r"^\s*from (\.+)([\w.]*) import (\([^)]*\)|.*)", re.MULTILINE)


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
    """The name of a kernel's file: the kernel's, then digests of its sources and of all that it depends on.

    Versions of the compiler are not in it: a bundle serves where no compiler is installed.
    """
    digest = hashlib.sha256("\0".join([kernel, sources, *map(repr, parts)]).encode())
    return f"{beginning_of(kernel, sources)}{digest.hexdigest()[:24]}"


def beginning_of(kernel: str, sources: str) -> str:
    """What the names of a kernel's files begin with, all those that are compiled from these sources."""
    return f"{kernel}-{sources[:8]}-"


@functools.cache
def sources_digest(*files: Path, module: str | None = None) -> str:
    """Digest of everything that a compiled kernel comes from: `files`, and of the kernels' sources those
    that `module`, seen from their root, can import, or all.
    """
    root = Path(arch.__file__).parent
    named = [(str(path.relative_to(root)), path) for path in sources(root, module)]
    digest = hashlib.sha256()
    for name, path in (*named, *((path.name, path) for path in files)):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def sources(root: Path, module: str | None = None) -> list[Path]:
    """The files below `root` that a kernel of `module` ("sm90.forward.kernel") can import, or all.

    A package's `__init__` is one where a name is imported from it: others run, too, but say nothing that a
    kernel sees.
    """
    if module is None:
        return sorted(root.rglob("*.py"))
    found = [root.joinpath(*module.split(".")).with_suffix(".py")]
    for path in found:  # which grows
        found += [other for other in imported(path) if other.is_relative_to(root) and other not in found]
    return sorted(found)


@functools.cache
def imported(path: Path) -> set[Path]:
    """The files that a file names in its relative imports, wherever in it they stand.

    Looked up once a process, which has its kernels' modules in memory from then on, too.
    """
    found = set()
    for dots, module, names in _RELATIVE.findall(path.read_text()):
        package = path.parents[len(dots) - 1].joinpath(*module.split("."))
        files = {_module_file(package / name) for name in re.findall(r"\w+", names)}
        found |= {_module_file(package) if file is None else file for file in files}
    return found - {None}


def _module_file(module: Path) -> Path | None:
    """Where a module or a package lies; None for what is neither."""
    places = (module.with_suffix(".py"), module / "__init__.py")
    return next((place for place in places if place.is_file()), None)


def get(key: str, build: Callable[[], Artifact]) -> Artifact:
    """The kernel `key` from the bundle, from the cache, or from `build`, whose result is then kept."""
    found = _from_bundle(key)
    if found is not None:
        return found
    path = _place_of(key)
    if path is None:
        return build()
    found = _read_if_whole(path)
    if found is not None:
        return found
    with _turn(path) as can_be_kept:
        found = _read_if_whole(path)  # another process may have been faster
        if found is None:
            found = build()
            if can_be_kept:
                _keep(path, found)
    return found


def write(path: Path, artifact: Artifact) -> None:
    """Write a kernel's file; it appears whole or not at all."""
    files = artifact.files()
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=_PART)
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, data in {**files, _SUMS: sums.encode()}.items():
                archive.writestr(name, data)
        with contextlib.suppress(OSError):  # mkstemp's is 0600; bundles are there to be shared
            os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read(path: Path) -> Artifact:
    """A kernel's file, checked; CorruptArtifact where it is not what was written, OSError where it cannot be
    read."""
    with open(path, "rb") as file:
        return _read(file)


def _read(file: IO[bytes]) -> Artifact:
    whole = io.BytesIO(file.read())  # so that errors beyond here are of the content
    try:
        with zipfile.ZipFile(whole) as archive:
            data = {name: archive.read(name) for name in archive.namelist()}
        sums = {name: digest for digest, name in (s.split() for s in data.pop(_SUMS).decode().splitlines())}
        actual = {name: hashlib.sha256(part).hexdigest() for name, part in data.items()}
        if sums != actual or not data:
            raise CorruptArtifact(f"{file.name}: the parts do not match {_SUMS}")
        return Artifact(
            data["kernel.o"], data["kernel.ptx"], data["kernel.cubin"], json.loads(data["kernel.json"])
        )
    except CorruptArtifact:
        raise
    except Exception as error:  # whatever a parser says of bytes that it does not understand
        raise CorruptArtifact(f"{file.name}: {error or type(error).__name__}") from error


def bundle_directory() -> Path | None:
    """The directory that CUTE_FLASH_BUNDLE names, whether it is there or not; None where it is not set."""
    named = os.environ.get("CUTE_FLASH_BUNDLE", "")
    return Path(os.path.expanduser(named)) if named else None


def cache_directory() -> Path | None:
    """Where compiled kernels are kept; None where they are not: turned off, or, with a warning, no home."""
    named = os.environ.get("CUTE_FLASH_CACHE", "")
    if named == _OFF:
        return None
    try:
        if named:
            return Path(named).expanduser()
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))  # which must be absolute, says its specification
        return (given if given.is_absolute() else Path.home() / ".cache") / "cute_flash"
    except RuntimeError as error:
        _tell("home", f"kernels are not kept: {error} Set CUTE_FLASH_CACHE to a directory, or to 0")
        return None


def kernels_in(folder: Path) -> list[Path]:
    """The kernels' files of a directory, which need not exist."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def folders_of(root: Path) -> list[Path]:
    """The cache's folders, one for each compiler that filled it."""
    return sorted(path for path in root.glob("dsl*-ffi*") if path.is_dir())


def clear(root: Path) -> None:
    """Remove every compiler's kernels, and nothing that is not the cache's."""
    for folder in folders_of(root):
        for suffix in (SUFFIX, _LOCK, _PART):
            for path in folder.glob(f"*{suffix}"):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what lies there besides is not ours
            folder.rmdir()


def refusal_of(folder: Path) -> str | None:
    """Why nothing is loaded from a directory; None where it can be, or does not exist."""
    try:
        return trust.reason_against(folder)
    except OSError as error:
        return str(error)


def fault_of_bundle(key: str) -> str | None:
    """Why CUTE_FLASH_BUNDLE has no kernel `key`, if anything is wrong with it; None too where it is not set.

    A bundle that has kernels of these sources, but not this one, was made for other calls: that is no fault.
    """
    folder = bundle_directory()
    if folder is None:
        return None
    if not os.path.isdir(folder):
        return f"CUTE_FLASH_BUNDLE names no directory: {folder}"
    names = [path.stem for path in kernels_in(folder)]
    if not names:
        return f"CUTE_FLASH_BUNDLE names a directory without kernels: {folder}"
    kernel = key.partition("-")[0]
    same = [name for name in names if name.startswith(f"{kernel}-")]
    if same and not any(name.startswith(f"{key.rpartition('-')[0]}-") for name in same):
        return (
            f"the kernels in CUTE_FLASH_BUNDLE ({folder}) were compiled from other sources: none of its "
            f"{len(same)} {kernel} can be used. Make it with the cute_flash that is installed here"
        )
    return None


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


def _from_bundle(key: str) -> Artifact | None:
    folder = bundle_directory()
    if folder is None or _is_refused(folder, folder):
        return None
    found = _read_if_whole(folder / (key + SUFFIX))
    if found is None and (fault := fault_of_bundle(key)):
        _tell(folder, fault)
    return found


def _place_of(key: str) -> Path | None:
    """Where the cache has a kernel's file; None where there is no cache."""
    root = cache_directory()
    if root is None or _is_refused(root, root) or _is_refused(root, root / compiler_tag()):
        return None
    return root / compiler_tag() / (key + SUFFIX)


def _is_refused(about: Path, folder: Path) -> bool:
    """Whether nothing is loaded from there, with a warning that says why."""
    why = refusal_of(folder)
    if why is None:
        return False
    _tell(about, f"{about} is not used, as kernels are native code: {why}. {trust.VARIABLE}=1 trusts it")
    return True


def _read_if_whole(path: Path) -> Artifact | None:
    """A file's kernel, if it is there, can be trusted and is whole."""
    try:
        with open(path, "rb") as file:
            why = trust.reason_against(file.fileno(), path)
            if why is None:
                return _read(file)
    except _ABSENT:
        return None
    except OSError as error:
        why = f"it cannot be read ({error})"
    except CorruptArtifact as error:
        why = str(error)
        warnings.warn(f"corrupt kernel file ignored: {error}", stacklevel=3)
        return None
    _tell(path.parent, f"kernel file ignored: {why}")
    return None


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[bool]:
    """Wait until no other process compiles this kernel; yields whether it can be kept."""
    folder, lock = path.parent, None
    try:
        for made in (folder.parent, folder):
            made.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        lock = open(path.with_suffix(_LOCK), "w")  # noqa: SIM115, closed below
        _lock(lock)
    except OSError as error:
        if lock is None:
            _tell(folder, f"kernels are not kept: the cache {folder} cannot be written ({error})")
        else:
            _tell(folder, f"the cache {folder} has no locks ({error}): racing processes compile the same")
    with lock or contextlib.nullcontext():
        yield lock is not None


def _lock(file: IO) -> None:
    """Hold a lock until the file is closed or the process dies; OSError where there is none to be had."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(f"another process has held it for {_PATIENCE:.0f} s") from None
        time.sleep(0.02)


def _keep(path: Path, artifact: Artifact) -> None:
    try:
        write(path, artifact)
    except OSError as error:
        _tell(path.parent, f"kernels are not kept: the cache {path.parent} cannot be written ({error})")


def _tell(about: Path | str, text: str) -> None:
    """Warn of a fault, the first time that it concerns this directory."""
    if about not in _told:
        _told.add(about)
        warnings.warn(text, stacklevel=3)


_told: set[Path | str] = set()
