"""Where the time of a run goes: CPU seconds by file, and what of them compiled, translated or executed.

A pytest plugin. Each test's seconds travel in its report, so that those of xdist's workers arrive too.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cute_flash import emulator, executable
from cute_flash.emulated_kernel import Driver

COLUMNS = ("compiling", "translating", "executing", "processes", "rest")
LEAST = 0.01  # of all: files below share a line
KEY = "CPU seconds"


class Clock:
    """CPU seconds of this process by phase, and of the processes that it started and has waited for."""

    def __init__(self) -> None:
        self.phases: Counter[str] = Counter()
        self._depth = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block, unless it runs within another phase, which has its time then."""
        self._depth += 1
        begun = time.process_time()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.phases[name] += time.process_time() - begun

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, as a phase."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def now(self) -> Counter[str]:
        """Seconds so far, by column."""
        times = os.times()
        found = Counter(self.phases)
        found["processes"] = times.children_user + times.children_system
        found["rest"] = time.process_time() - sum(self.phases.values())
        return found


CLOCK = Clock()


def pytest_configure(config):
    """Time what compiles, translates and executes kernels, wherever a test calls it."""
    executable.build = CLOCK.timed("compiling", executable.build)
    emulator.Program.__init__ = CLOCK.timed("translating", emulator.Program.__init__)
    Driver.call = CLOCK.timed("executing", Driver.call)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Begin a test's seconds; those of its fixtures are its own."""
    item.stash[_before] = CLOCK.now()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The last of a test's reports carries them."""
    report = yield
    if call.when == "teardown":
        spent = {name: seconds - item.stash[_before][name] for name, seconds in CLOCK.now().items()}
        report.user_properties.append((KEY, spent))
    return report


_before = pytest.StashKey[Counter]()
_spent: defaultdict[str, Counter[str]] = defaultdict(Counter)


def pytest_runtest_logreport(report):
    """Collect, where the run is reported."""
    if report.when == "teardown":
        _spent[report.nodeid.partition("::")[0]].update(dict(report.user_properties)[KEY])


def pytest_terminal_summary(terminalreporter):
    """The table, at the end of a run."""
    if _spent:
        terminalreporter.section("CPU seconds of the tests")
        terminalreporter.write_line("\n".join(table(_spent)))


def table(spent: dict[str, Counter[str]]) -> list[str]:
    """A line for each file that costs enough, the most expensive first; one for the others; one for all."""
    total = sum(spent.values(), Counter())
    least = LEAST * total.total()
    rows = [row for row in spent.items() if row[1].total() >= least]
    others = sum((seconds for _, seconds in spent.items() if seconds.total() < least), Counter())
    rows = sorted(rows, key=lambda row: -row[1].total())
    rows += [(f"{len(spent) - len(rows)} other files", others)] * (len(rows) < len(spent))
    head = "".join(f"{name:>12}" for name in ("all", *COLUMNS))
    return [head, *(_line(name, seconds) for name, seconds in rows), _line("all", total)]


def _line(name: str, seconds: Counter[str]) -> str:
    columns = (seconds.total(), *(seconds[column] for column in COLUMNS))
    return "".join(f"{number:12.1f}" for number in columns) + f"  {name}"
