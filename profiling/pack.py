"""python -m profiling pack DIR: everything that a report needs on a machine that can install nothing.

That machine: Linux on x86-64, Python 3.12, torch 2.11 for CUDA 13, no network, no compiler. DIR then holds

    run.sh          unpacks the rest and runs `python3 -m profiling report`; its arguments go there
    base.tar.xz     this project, its compiled kernels, flash-attn-4's compiled kernels
    *.whl           apache-tvm-ffi, numpy, FlashAttention-3
    *.zip           with --backward: FlashAttention-3 from xformers, which has the backward pass, and the
                    runtime of CUDA 12, which it is linked to
    MANIFEST.json   what is in it, from which versions, and what had to be left out

The wheels are for Python 3.12.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import lzma
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from . import measure, peers
from .record import write_whole
from .stages import correctness, environment, speed

ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE = 60 << 20
PART = 50 << 20
PYTHON = "3.12"
WHEELS = ("apache-tvm-ffi", "cuda-bindings", "cuda-pathfinder", "numpy", "fa3-fwd==0.0.3")
# Wheel -> its members that are carried -> where they lie there.
BACKWARD = {
    "xformers==0.0.34": {"xformers/flash_attn_3/_C.so": "xformers/flash_attn_3/_C.so"},
    "nvidia-cuda-runtime-cu12": {
        "nvidia/cuda_runtime/lib/libcudart.so.12": "cuda12/libcudart.so.12",
    },
}
NEVER = {"nvidia-cutlass-dsl": "kernels are carried compiled"}
WITHOUT_BACKWARD = {"FlashAttention-3's backward pass": "some 100 MiB more: --backward"}
PLATFORMS = tuple(f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)) + ("manylinux2014_x86_64",)
# Folder here -> folder there; `arch` is a part of the package when it is installed.
SOURCES = {"cute_flash": "cute_flash", "arch": "cute_flash/arch", "profiling": "profiling", "tests": "tests"}
SUFFIXES = (".py", ".csv", ".md")
RUN = """#!/bin/sh
# Unpacks what lies beside this file into $CUTE_FLASH_WORK (default: /tmp/cute_flash_report) and runs
# `python3 -m profiling report` there with the arguments given. Results go to $OUT, by default ./results.
# Without a GPU: run.sh --dry-run --arch ARCH.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=${CUTE_FLASH_WORK:-/tmp/cute_flash_report}
python=${PYTHON:-python3}
if [ -e "$work/unpacked" ] && ! cmp -s "$here/MANIFEST.json" "$work/unpacked"; then
    echo "$work holds another pack: remove it, or name another place in CUTE_FLASH_WORK" >&2
    exit 2
fi
if [ ! -e "$work/unpacked" ]; then
    mkdir -p "$work/site"
    for first in "$here"/*.part00; do
        [ -e "$first" ] && cat "${first%.part00}".part* > "$work/$(basename "${first%.part00}")"
    done
    for archive in "$here"/base.tar.xz "$work"/base.tar.xz; do
        [ -e "$archive" ] && "$python" -m tarfile -e "$archive" "$work"
    done
    for wheel in "$here"/*.whl "$here"/*.zip "$work"/*.whl "$work"/*.zip; do
        case "$wheel" in */numpy-*) "$python" -c 'import numpy' 2> /dev/null && continue ;; esac
        [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$work/site"
    done
    cp "$here/MANIFEST.json" "$work/unpacked"
fi
export PYTHONPATH="$work/site" PYTHONUNBUFFERED=1
export CUTE_FLASH_BUNDLE="$work/kernels" CUTE_FLASH_PEERS="$work/peers"
exec "$python" -m profiling report --out "${OUT:-$here/results}" "$@"
"""


def main(arguments: list[str]) -> int:
    """Build the directory; 0 where nothing was left out but what is never carried or was not asked for."""
    parser = argparse.ArgumentParser(prog="python -m profiling pack", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="made if missing; must be empty")
    add("--arch", default="sm90", help="the architecture of the GPU there; default: %(default)s")
    add("--wheels", type=Path, metavar="DIR", help="take wheels from here, not from the network")
    add("--backward", action="store_true", help="also FlashAttention-3 with its backward pass")
    add("--quick", action="store_true", help="only the kernels that a dry run needs")
    add("--jobs", type=int, default=os.cpu_count(), help="compiling processes; default: all cores")
    chosen = parser.parse_args(arguments)
    from cute_flash.dispatch import EMULATED

    if chosen.arch not in EMULATED:
        print(f"--arch is {chosen.arch}; allowed: {', '.join(EMULATED)}", file=sys.stderr)
        return 2
    if chosen.directory.exists() and any(chosen.directory.iterdir()):
        print(f"{chosen.directory} is not empty: name a new directory", file=sys.stderr)
        return 2
    chosen.directory.mkdir(parents=True, exist_ok=True)
    left_out = build(chosen)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    for path in sorted(chosen.directory.iterdir()):
        print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.name}")
    return 1 if set(left_out) - {*NEVER, *WITHOUT_BACKWARD} else 0


def build(chosen: argparse.Namespace) -> dict[str, str]:
    """Fill the directory; returns what was left out, and why."""
    from cute_flash import cache

    left_out, before = dict(NEVER), cache.sources_digest()
    if platform.python_version_tuple()[:2] != tuple(PYTHON.split(".")):
        left_out["kernels of rules outside the package"] = (
            f"this is Python {platform.python_version()}, they must be compiled with {PYTHON}"
        )
    left_out |= wheels(chosen.directory, chosen.wheels)
    left_out |= backward(chosen.directory, chosen.wheels) if chosen.backward else WITHOUT_BACKWARD
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch)
        left_out |= kernels(stage / "kernels", chosen.arch, chosen.quick, chosen.jobs)
        left_out |= flash_attn_4(stage / "peers", chosen.arch, chosen.quick)
        cache.sources_digest.cache_clear()
        if cache.sources_digest() != before:
            raise SystemExit("the kernels' sources changed meanwhile, the bundle does not fit them: again")
        archive(stage, chosen.directory / "base.tar.xz")
    run = chosen.directory / "run.sh"
    run.write_text(RUN)
    run.chmod(0o755)
    for path in sorted(chosen.directory.iterdir()):
        split(path)
    manifest = {
        "built with": environment.versions() | {"arch": chosen.arch},
        "files": {path.name: _facts(path) for path in sorted(chosen.directory.iterdir())},
        "left out": left_out,
    }
    write_whole(chosen.directory / "MANIFEST.json", json.dumps(manifest, indent=1) + "\n")
    return left_out


def wheels(directory: Path, source: Path | None) -> dict[str, str]:
    """Copy or download the wheels; returns what could not be had."""
    found = {name: download(name, directory, source) for name in WHEELS}
    return {name: reason for name, reason in found.items() if reason}


def backward(directory: Path, source: Path | None) -> dict[str, str]:
    """Put the members of BACKWARD into a zip; returns what could not be had."""
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: download(name, Path(scratch), source) for name in BACKWARD}
        if any(found.values()):
            return {name: reason for name, reason in found.items() if reason}
        for name, members in BACKWARD.items():
            stem = name.partition("=")[0].replace("-", "_")
            (wheel,) = Path(scratch).glob(f"{stem}-*.whl")
            _carry(wheel, members, directory / "backward.zip")
    return {}


def _carry(wheel: Path, members: dict[str, str], path: Path) -> None:
    """Add members of a wheel to a zip, under other names."""
    with zipfile.ZipFile(wheel) as given, zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as target:
        for here, there in members.items():
            target.writestr(there, given.read(here))


def download(name: str, directory: Path, source: Path | None) -> str:
    """Download a wheel, or copy it from `source`; returns why it could not be had, or ""."""
    fixed = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    fixed += [word for name in PLATFORMS for word in ("--platform", name)]
    fixed += ["--no-index", "--find-links", str(source)] if source else []
    print(f"wheel {name}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "-q", *fixed, "-d", str(directory), name]
    answer = subprocess.run(command, capture_output=True, text=True)
    if not answer.returncode:
        return ""
    errors = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or ["pip failed without a word"])[-1]


def kernels(directory: Path, arch: str, quick: bool, processes: int) -> dict[str, str]:
    """Compile what the report's calls need into a bundle; returns the calls whose kernels failed."""
    from cute_flash.dispatch import EMULATED
    from tests.cases import CASES

    from .report import kernels_of

    directory.mkdir(parents=True)
    names: list[Any] = list(correctness.DRY_CASES if quick else CASES)
    if quick:
        names += ["lengths_65_63_causal"]
    rows = [*speed.called(True), measure.Row(128, 128, True, 64, 1, 1), *correctness.DRY_LARGE]
    rows += [] if quick else [*speed.called(False), *correctness.LARGE]
    # First choices first; then the same calls for every other kernel that the report will measure.
    _, *others = kernels_of(EMULATED[arch])
    todo = [(what, k) for k in (None, *others) for what in (*names, *differing(rows, arch, k))]
    work = functools.partial(_compile_for, arch=arch, directory=str(directory))
    failed = {}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        results = pool.map(work, *zip(*todo, strict=True))
        for number, ((what, kernel), error) in enumerate(zip(todo, results, strict=True), start=1):
            label = (what if isinstance(what, str) else what.key) + (f" ({kernel})" if kernel else "")
            print(f"kernels [{number}/{len(todo)}] {label}{': ' + error if error else ''}", flush=True)
            if error:
                failed[f"the kernel of {label}"] = error
    return failed


def differing(rows: list[measure.Row], arch: str, kernel: str | None) -> list[measure.Row]:
    """Of some rows as many as ask for different kernels: which one a row gets depends on all its sizes."""
    found: dict[tuple, measure.Row] = {}
    for row in rows:
        try:
            asked = tuple(asked_for(row, arch, kernel))
        except NotImplementedError:  # told when it is to be compiled
            asked = (row,)
        found.setdefault(asked, row)
    return list(found.values())


def _compile_for(what: Any, kernel: str | None, arch: str, directory: str) -> str:
    """Compile the kernels of a case, by name, or of a row's shape; returns why not, or "".

    kernel: this one instead of the first choice, where it serves the call.
    """
    import torch

    from cute_flash import cache, executable

    try:
        with torch.no_grad():
            for asked in asked_for(what, arch, kernel):
                path = Path(directory) / (executable.key_of(*asked) + cache.SUFFIX)
                if not path.exists():
                    cache.write(path, executable.artifact(*asked))
    except NotImplementedError as error:
        return "" if kernel else f"{error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def asked_for(what: Any, arch: str, kernel: str | None = None) -> list[tuple]:
    """(kernel, problem, config, device) of every kernel that a case or row launches; nothing is launched.

    kernel: the only one that may serve, None for any.
    """
    import torch

    from cute_flash import emulated, flash_attn_func, repeat
    from cute_flash.dispatch import only
    from tests.cases import CASES
    from tests.harness import Call

    found: dict[tuple, None] = {}

    def record(kernel, problem, config, device, route):
        found[kernel, problem, config, device] = None
        return lambda *operands: None

    repeat.forget()  # calls that are remembered ask for no kernel; nor may these be
    try:
        with mock.patch("cute_flash.launch.executable", record), only(kernel):
            if isinstance(what, str):
                Call.make(CASES[what]).run(arch)
            else:
                with emulated(arch):
                    inputs = (torch.empty(shape, dtype=torch.bfloat16) for shape in what.shapes)
                    flash_attn_func(*inputs, causal=what.causal)
    finally:
        repeat.forget()
    return list(found)


def flash_attn_4(directory: Path, arch: str, quick: bool) -> dict[str, str]:
    """Compile flash-attn-4's kernels of the sweep's rows, one object per kernel, with an index by row.

    Per head dim and mask the shortest and the longest row are compiled; where both give the same kernel and
    arguments, so do the rows between, else each is compiled. Returns what was left out.
    """
    from cute_flash.dispatch import EMULATED
    from tests.peers.flash_attn_4 import Case

    from . import flash_attn_4 as peer

    directory.mkdir(parents=True)
    target = EMULATED[arch].target
    index: dict[str, Any] = {"target": target, "rows": {}, "left out": {}}
    groups: dict[tuple, list[measure.Row]] = {}
    for row in measure.sweep(dry_run=quick):
        groups.setdefault((row.head_dim, row.head_dim_v, row.causal), []).append(row)

    def asked(row: measure.Row) -> Case:
        lengths, heads = (row.seqlen,), row.heads
        dim_v = None if row.head_dim_v == row.head_dim else row.head_dim_v
        return Case(f"pack-{row.key}", lengths, lengths, heads, heads, row.head_dim, row.causal, dim_v=dim_v)

    def compiled(row: measure.Row) -> dict[str, Any]:
        print(f"flash-attn-4 {row.key}", flush=True)
        kernel = peer.compiled(asked(row), target).kernel
        name = hashlib.sha256(kernel.ptx.encode()).hexdigest()[:16] + ".o"
        if not (directory / name).exists():
            (directory / name).write_bytes(kernel.object_file.read_bytes())
        return {"object": name, "arguments": kernel.arguments}

    ends_of = {
        key: [end(rows, key=lambda row: row.seqlen) for end in (min, max)] for key, rows in groups.items()
    }
    with contextlib.suppress(peer.Missing):  # which says so again below
        peer.prepare([asked(row) for ends in ends_of.values() for row in dict.fromkeys(ends)], target)
    for key, rows in groups.items():
        try:
            ends = [compiled(row) for row in dict.fromkeys(ends_of[key])]
            same = all(end == ends[0] for end in ends)
            index["rows"] |= {row.key: ends[0] if same else compiled(row) for row in rows}
        except peer.Missing as reason:
            index["left out"] |= {row.key: str(reason) for row in rows}
    (directory / peers.INDEX).write_text(json.dumps(index, indent=1))
    reasons = {reason: key for key, reason in index["left out"].items()}
    return {f"{peer.NAME} of {key} and others": reason for reason, key in reasons.items()}


def archive(stage: Path, path: Path) -> None:
    """Write base.tar.xz: site/ (the sources), and what `stage` holds; the same bytes for the same content."""
    print(f"archive {path.name}", flush=True)
    members = [(f"site/{name}", content) for name, content in sources()]
    members += [(str(p.relative_to(stage)), p.read_bytes()) for p in sorted(stage.rglob("*")) if p.is_file()]
    with lzma.open(path, "wb", preset=6) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def sources() -> Iterable[tuple[str, bytes]]:
    """(path there, content) of every source file, and of COMMIT, which says what they are."""
    for here, there in SOURCES.items():
        for path in sorted((ROOT / here).rglob("*")):
            inside = path.relative_to(ROOT / here)
            if path.suffix in SUFFIXES and not {"__pycache__", "results"} & set(inside.parts):
                yield f"{there}/{inside}", path.read_bytes()
    yield "COMMIT", f"{environment.commit()}\n".encode()


def split(path: Path) -> None:
    """Replace a file that is too large by NAME.part00, NAME.part01, ...; run.sh puts them together."""
    if path.stat().st_size <= LARGEST_FILE:
        return
    content = path.read_bytes()
    for number, start in enumerate(range(0, len(content), PART)):
        path.with_name(f"{path.name}.part{number:02}").write_bytes(content[start : start + PART])
    path.unlink()


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
