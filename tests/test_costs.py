"""What the end of a run says of its cost, and what is kept for the next one."""

from __future__ import annotations

import os
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from _pytest.reports import TestReport

from tests import conftest, costs


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_phase_within_another_counts_once():
    clock = costs.Clock()
    before = clock.now()
    with clock.phase("executing"):
        spin(0.02)
        clock.timed("translating", spin)(0.02)
    spin(0.02)
    spent = {name: seconds - before[name] for name, seconds in clock.now().items()}
    assert spent.keys() == {"executing", "processes", "rest"} <= set(costs.COLUMNS)
    assert spent["executing"] >= 0.04 and 0.02 <= spent["rest"] < 0.04


def test_the_run_at_hand_is_timed(request):
    """Compiling, translating and executing are watched, and a report carries a test's seconds to the end."""
    from cute_flash import emulator, executable
    from cute_flash.emulated_kernel import Driver

    watched = (executable.build, emulator.Program.__init__, Driver.call)
    assert all(hasattr(function, "__wrapped__") for function in watched)
    assert costs._before in request.node.stash
    spent = {"compiling": 1.5, "rest": 0.25}
    sent = TestReport("tests/a.py::b", ("a", 1, "b"), {}, "passed", None, "teardown", (), 0.1, 0, 0,
                      [(costs.KEY, spent)])  # fmt: skip
    arrived = TestReport._from_json(sent._to_json())
    assert [tuple(each) for each in arrived.user_properties] == [(costs.KEY, spent)]


def test_the_table_adds_up():
    spent = {
        "cheap.py": Counter(rest=0.5), "dear.py": Counter(compiling=70.0, rest=1.0),
        "cheaper.py": Counter(executing=0.25), "middling.py": Counter(executing=30.0, processes=2.0),
    }  # fmt: skip
    head, *lines = (line.split() for line in costs.table(spent))
    assert head == ["all", *costs.COLUMNS]
    assert lines == [
        ["71.0", "70.0", "0.0", "0.0", "0.0", "1.0", "dear.py"],
        ["32.0", "0.0", "0.0", "30.0", "2.0", "0.0", "middling.py"],
        ["0.8", "0.0", "0.0", "0.2", "0.0", "0.5", "2", "other", "files"],
        ["103.8", "70.0", "0.0", "30.2", "2.0", "1.5", "all"],
    ]


class Kernels:
    """Stands for the function that remembers kernels. counts: what it has been asked for, test by test."""

    def __init__(self, *counts: int) -> None:
        self.counts, self.cleared = list(counts), 0

    def cache_info(self) -> SimpleNamespace:
        return SimpleNamespace(misses=self.counts[0], currsize=self.counts[0])

    def cache_clear(self) -> None:
        self.cleared += 1
        self.counts[0] = 0


def test_translated_kernels_are_not_looked_through(monkeypatch):
    """After a test that asked for another kernel, and after no other; where there are too many, all go."""
    most, done = conftest.MOST_TRANSLATED, []
    known = Kernels(0, 3, 3, most, most + 1, 1)
    monkeypatch.setattr(conftest.executable, "executable", known)
    for name in ("freeze", "unfreeze"):
        monkeypatch.setattr(conftest.gc, name, lambda name=name: done.append(name))
    item = SimpleNamespace(session=SimpleNamespace(stash=pytest.Stash()))
    found = []
    for _ in range(6):
        conftest.pytest_runtest_teardown(item)
        known.counts.pop(0)
        found.append(done[:])
        done.clear()
    assert found == [[], ["freeze"], [], ["freeze"], ["unfreeze"], ["freeze"]]
    assert known.cleared == 1


def test_kernels_are_kept_for_other_clones(tmp_path, monkeypatch, request):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert conftest.place_of_kernels(request.config) == tmp_path / "cute_flash-tests"
    (tmp_path / "file").touch()  # in which there is no room for a directory
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert conftest.place_of_kernels(request.config) == request.config.cache.mkdir("kernels")


def test_kernels_read_long_ago_make_room(tmp_path):
    for age, name in enumerate(("new", "used", "old")):
        for suffix in (".kernel", ".lock"):
            (tmp_path / "dsl").mkdir(exist_ok=True)
            path = tmp_path / "dsl" / (name + suffix)
            path.write_bytes(b"x" * 100)
            os.utime(path, (1000 - 100 * age, 1000 - 500 * age))
    conftest.bound(tmp_path, 300)
    assert len(list(tmp_path.rglob("*.kernel"))) == 3
    conftest.bound(tmp_path, 299)
    assert {path.name for path in tmp_path.rglob("*.*")} == {f"{n}{s}" for n in ("new", "used")
                                                             for s in (".kernel", ".lock")}  # fmt: skip
