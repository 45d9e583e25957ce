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
        default=os.environ.get("CUTE_FLASH_TEST_ARCH", "sm80"),
        help="the architecture to emulate where there is no GPU (default: %(default)s)",
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


@pytest.fixture(scope="session")
def machine(request) -> str:
    """Where calls of a test run: "cuda", or the architecture that is emulated."""
    return "cuda" if torch.cuda.is_available() else request.config.getoption("--arch")


@pytest.fixture(scope="session")
def arch(request) -> str:
    """The architecture that is emulated, also where there is a GPU."""
    return request.config.getoption("--arch")


def pytest_terminal_summary(terminalreporter):
    """What is beyond the house limits, at the end of a run."""
    if found := offenders():
        terminalreporter.section("beyond the house limits (guides, not errors)")
        terminalreporter.write_line("\n".join(found))
