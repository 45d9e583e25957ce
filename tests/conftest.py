"""The device that a test runs on, a GPU or an emulated one, and the run's compile cache."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

from tests.test_house import offenders

CACHE = "CUTE_FLASH_CACHE"


def pytest_addoption(parser):
    parser.addoption(
        "--arch",
        default=os.environ.get("CUTE_FLASH_TEST_ARCH", "sm80,sm90,sm100"),
        help="the architectures to emulate where there is no GPU, by commas (default: %(default)s)",
    )


def pytest_configure(config):
    """One compile cache per run, made by the first process and shared by its workers."""
    if CACHE not in os.environ:
        config.stash[_made] = tempfile.TemporaryDirectory(prefix="cute_flash_tests_")
        os.environ[CACHE] = config.stash[_made].name


def pytest_unconfigure(config):
    if made := config.stash.get(_made, None):
        made.cleanup()
        del os.environ[CACHE]


_made = pytest.StashKey[tempfile.TemporaryDirectory]()


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
    """What is beyond the house limits, at the end of a run."""
    if found := offenders():
        terminalreporter.section("beyond the house limits (guides, not errors)")
        terminalreporter.write_line("\n".join(found))
