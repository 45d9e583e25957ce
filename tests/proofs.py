"""Proofs that name what they proved: outcomes of long trials, kept in tests/proofs.txt.

A trial's outcome stands there under a seal: a digest of all that it depends on (a kernel's PTX and host code,
its operands, the emulator, the code of the trial) and of the outcome itself. A trial whose seal fits has its
outcome from there; one that is new, or whose line was edited, runs. So does a random tenth of those that fit,
other ones in every run, and must find what the ledger says: that is how one that is wrong is found.

    pytest --prove         run all and nothing else, and write the ledger
    pytest --record        run every test as always, and write what ran to the ledger
    pytest --proof-seed N  draw the tenth of run N again, which that run named

A pytest plugin; the fixture is `proven`.
"""

from __future__ import annotations

import ast
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "tests" / "proofs.txt"
SHARE = 10  # one of so many runs again
KEY = "proof"
HEAD = "# What was proven: seal, outcome, test. Written by `make prove`, read by tests/proofs.py.\n"


def sealed(outcome: str, inputs: Iterable[bytes]) -> str:
    """The seal of an outcome that depends on `inputs`."""
    digest = hashlib.sha256()
    for part in (outcome.encode(), *inputs):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:24]


def read(path: Path) -> dict[str, tuple[str, str]]:
    """Test -> (seal, outcome), of every line; none where there is no ledger."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = (line.split("  ", 2) for line in lines if not line.startswith("#"))
    return {name: (seal, outcome) for seal, outcome, name in rows}


def write(path: Path, entries: dict[str, tuple[str, str]]) -> None:
    """A line for each entry, in order of tests."""
    lines = (f"{seal}  {outcome}  {name}\n" for name, (seal, outcome) in sorted(entries.items()))
    path.write_text(HEAD + "".join(lines))


def drawn(name: str, seed: int) -> bool:
    """Whether a proof is among the tenth that runs again."""
    return not random.Random(f"{seed} {name}").randrange(SHARE)


def meaning(path: Path) -> bytes:
    """A source file without its comments, docstrings and layout."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            body[0] = ast.Pass()
    return ast.unparse(tree).encode()


def _is_text(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


@cache
def emulator() -> tuple[bytes, ...]:
    """What the emulator does, and what calls it."""
    package = ROOT / "cute_flash"
    files = (*sorted((package / "emulator").rglob("*.py")), package / "emulated_kernel.py")
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(package)).encode() + b"\0" + meaning(path) + b"\0")
    return (digest.digest(),)


class Proof:
    """One test's: called with a trial and all that its outcome depends on, it returns the outcome."""

    def __init__(self, name: str, entries: dict[str, tuple[str, str]], seed: int | None) -> None:
        self.name, self.entries, self.seed = name, entries, seed
        self.said: tuple[str, str, str] | None = None  # how it was found, its seal, the outcome

    def fits(self, inputs: Iterable[bytes]) -> bool:
        """Whether the ledger has an outcome that depends on just these inputs."""
        seal, outcome = self.entries.get(self.name, ("", ""))
        return self.seed is not None and seal == sealed(outcome, inputs)

    def __call__(self, trial: Callable[[], str], inputs: Iterable[bytes], together: str = "") -> str:
        """The outcome, of a line of text without double spaces.

        together: proofs that give the same name run again together, as they share what is costly.
        Raises AssertionError where the trial runs again and finds another one than the ledger has.
        """
        inputs = tuple(inputs)
        seal, outcome = self.entries.get(self.name, ("", ""))
        fits = self.fits(inputs)
        if fits and not drawn(together or self.name, self.seed):
            self.said = "taken from the ledger", seal, outcome
            return outcome
        found = trial()
        self.said = "run again" if fits else "run", sealed(found, inputs), found
        assert not fits or found == outcome, (
            f"{LEDGER.name} is wrong: it says {outcome!r}, this run found {found!r} with the same kernel, "
            "emulator and test. `make prove` writes it anew"
        )
        return found


def pytest_addoption(parser):
    parser.addoption("--prove", action="store_true", help="run every proof and write tests/proofs.txt")
    parser.addoption("--record", action="store_true", help="write proofs that ran to tests/proofs.txt")
    parser.addoption("--proof-seed", type=int, help="draws the tenth that runs again (default: random)")


def pytest_configure(config):
    """Draw a seed, once: workers get the first process's options."""
    if config.option.proof_seed is None:
        config.option.proof_seed = random.SystemRandom().randrange(10**6)


def pytest_collection_modifyitems(config, items):
    """With --prove, tests that have a proof."""
    if config.option.prove:
        others = [item for item in items if "proven" not in item.fixturenames]
        items[:] = [item for item in items if "proven" in item.fixturenames]
        config.hook.pytest_deselected(items=others)


@cache
def _ledger() -> dict[str, tuple[str, str]]:
    return read(LEDGER)


@pytest.fixture
def proven(request) -> Iterator[Proof]:
    """The test's proof."""
    option = request.config.option
    name = request.node.nodeid.removeprefix("tests/")
    proof = Proof(name, _ledger(), None if option.prove else option.proof_seed)
    yield proof
    if proof.said:
        request.node.user_properties.append((KEY, [proof.name, *proof.said]))


_said: dict[str, tuple[str, str, str]] = {}
_failed: set[str] = set()


def pytest_runtest_logreport(report):
    """Collect what tests say, where the run is reported."""
    if report.failed:
        _failed.add(report.nodeid.removeprefix("tests/"))
    for key, value in report.user_properties if report.when == "teardown" else ():
        if key == KEY:
            _said[value[0]] = tuple(value[1:])


def pytest_terminal_summary(terminalreporter, config):
    """How many ran, and the seed; with --prove or --record, write those of the tests that passed."""
    if not _said:
        return
    counted = Counter(how for how, _, _ in _said.values())
    told = ", ".join(f"{number} {how}" for how, number in sorted(counted.items()))
    terminalreporter.section("proofs")
    terminalreporter.write_line(f"{told}; --proof-seed {config.option.proof_seed}")
    if config.option.prove or config.option.record:
        passed = {name: (seal, outcome) for name, (_, seal, outcome) in _said.items() if name not in _failed}
        write(LEDGER, read(LEDGER) | passed)
        terminalreporter.write_line(f"{len(passed)} written to {LEDGER.relative_to(ROOT)}")
