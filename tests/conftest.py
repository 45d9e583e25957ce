"""The device that a test runs on, a GPU or an emulated one, and where compiled kernels are kept."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from cute_flash import executable, repeat
from tests.test_house import offenders

CACHE = "CUTE_FLASH_CACHE"
HOUSE = "tests/test_house.py"
LONGEST = ("test_install.py", "test_profiling_pack.py", "test_profiling_report.py")
MOST_KEPT = 4 << 30  # bytes: many runs' worth
MOST_TRANSLATED = 256  # kernels of a process, of some megabytes each
pytest_plugins = ("tests.costs", "tests.proofs")


def pytest_addoption(parser):
    parser.addoption(
        "--arch",
        default=os.environ.get("CUTE_FLASH_TEST_ARCH", "sm80,sm90,sm100"),
        help="the architectures to emulate where there is no GPU, by commas (default: %(default)s)",
    )


def pytest_configure(config):
    """One thread a process, also for those that tests start: tensors are small, and threads that wait for
    each other on busy cores take ten times the oracle's own time. Memory that a tensor is given and nobody
    has written holds NaN: who reads it fails in every run, not in one of twenty. Compiled kernels are kept
    between runs, those of other clones too, unless the environment names a place.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ["OMP_NUM_THREADS"] = "1"
    if CACHE not in os.environ:
        config.stash[_kept] = place_of_kernels(config)
        os.environ[CACHE] = str(config.stash[_kept])


def place_of_kernels(config) -> Path:
    """The user's, whatever the clone: a kernel's name tells its sources. Where there is none, the clone's."""
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cute_flash-tests"
        place.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none to write to
        return config.cache.mkdir("kernels")
    return place


def pytest_unconfigure(config):
    """The first process, which the workers inherit the place from, makes room for the next run."""
    if kept := config.stash.get(_kept, None):
        del os.environ[CACHE]
        bound(kept, MOST_KEPT)


def bound(directory: Path, most: int) -> None:
    """Remove the kernels that were read longest ago until those that are left take `most` bytes."""
    found = [(path, path.stat()) for path in directory.rglob("*.kernel")]
    for path, stat in sorted(found, key=lambda each: -max(each[1].st_atime, each[1].st_mtime)):
        most -= stat.st_size
        if most < 0:
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)


_kept = pytest.StashKey[Path]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The longest tests first: one that a process begins last would keep the others waiting."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """Translated kernels stay, each of a hundred thousand objects: collections need not look through them.

    Beyond a number all go, and are translated again where they are asked for.
    """
    kernels = executable.executable.cache_info()
    if kernels.currsize > MOST_TRANSLATED:
        executable.executable.cache_clear()
        repeat.forget()
        gc.unfreeze()
        gc.collect()
    elif kernels.misses != item.session.stash.get(_asked, 0):
        gc.collect()
        gc.freeze()
    item.session.stash[_asked] = executable.executable.cache_info().misses


_asked = pytest.StashKey[int]()


def pytest_generate_tests(metafunc):
    """A test of kernels runs once for each architecture that is emulated."""
    emulated = metafunc.config.getoption("--arch").split(",")
    if "arch" in metafunc.fixturenames:
        metafunc.parametrize("arch", emulated, indirect=True, scope="session")
    if "machine" in metafunc.fixturenames:
        places = ["cuda"] if torch.cuda.is_available() else emulated
        metafunc.parametrize("machine", places, indirect=True, scope="session")


@pytest.fixture(scope="session")
def machine(request) -> str:
    """Where calls of a test run: "cuda", or an architecture that is emulated."""
    return request.param


@pytest.fixture(scope="session")
def arch(request) -> str:
    """An architecture that is emulated, also where there is a GPU."""
    return request.param


def pytest_terminal_summary(terminalreporter):
    """What is beyond the house limits, at the end of a run of the house rules."""
    ran = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    if any(report.nodeid.startswith(HOUSE) for report in ran) and (found := offenders()):
        terminalreporter.section("beyond the house limits (guides, not errors)")
        terminalreporter.write_line("\n".join(found))
