"""The ledger of proofs: what is new runs, what fits is taken, and a ledger that is wrong is found."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests import proofs
from tests.emulator.negative.subjects import FULL
from tests.emulator.negative.trial import Subject, dependencies
from tests.proofs import Proof, drawn, sealed

NAME = "a.py::test"
INPUTS = (b"ptx", b"emulator")
AGAIN = next(seed for seed in range(1000) if drawn(NAME, seed))
NOT_AGAIN = next(seed for seed in range(1000) if not drawn(NAME, seed))


def tried(entries: dict, seed: int | None, inputs=INPUTS, outcome: str = "right") -> tuple[str, str, int]:
    """(outcome, how it was found, how many trials ran)"""
    ran = []

    def trial():
        ran.append(1)
        return outcome

    proof = Proof(NAME, entries, seed)
    found = proof(trial, inputs)
    return found, proof.said[0], len(ran)


def entry(outcome: str = "right", inputs=INPUTS) -> dict:
    return {NAME: (sealed(outcome, inputs), outcome)}


def test_what_is_new_runs():
    assert tried({}, NOT_AGAIN) == ("right", "run", 1)
    for others in ((b"other", b"emulator"), (b"ptx", b"other"), (b"pt", b"xemulator"), (b"ptx",)):
        assert tried(entry(), NOT_AGAIN, inputs=others) == ("right", "run", 1)


def test_what_fits_is_taken():
    assert tried(entry(), NOT_AGAIN, outcome="wrong") == ("right", "taken from the ledger", 0)


def test_all_run_for_a_new_ledger():
    assert tried(entry("wrong"), None) == ("right", "run", 1)


def test_an_edited_line_runs():
    """The seal is of the outcome, too."""
    ((seal, _),) = entry("wrong").values()
    assert tried({NAME: (seal, "right")}, NOT_AGAIN, outcome="wrong") == ("wrong", "run", 1)


def test_a_forged_line_is_found():
    """One whose seal fits, by the tenth that runs again: in a tenth of the runs."""
    forged = entry("right")
    with pytest.raises(AssertionError, match="proofs.txt is wrong: it says 'right', this run found 'wrong'"):
        tried(forged, AGAIN, outcome="wrong")
    assert tried(forged, AGAIN) == ("right", "run again", 1)
    found = sum(drawn(NAME, seed) for seed in range(2000))
    assert 150 < found < 250
    assert len({name for name in map(str, range(2000)) if drawn(name, AGAIN)}) in range(150, 250)


def test_what_is_costly_together_runs_together():
    """Drawn by the name that several give, not by their own."""
    proof = Proof(NAME, entry(), AGAIN)
    others = next(name for name in map(str, range(1000)) if not drawn(name, AGAIN))
    assert proof(lambda: "wrong", INPUTS, together=others) == "right"
    with pytest.raises(AssertionError, match="is wrong"):
        Proof("b.py::test", {"b.py::test": entry()[NAME]}, AGAIN)(lambda: "wrong", INPUTS, together=NAME)
    assert proof.fits(INPUTS) and not proof.fits((b"other",)) and not Proof(NAME, entry(), None).fits(INPUTS)


def test_what_is_read_is_what_was_written(tmp_path):
    entries = {"b.py::t[x-a wait for one]": ("00ff", "unnoticed of 3: 0 2"), "a.py::t": ("11", "right")}
    path = tmp_path / "proofs.txt"
    assert proofs.read(path) == {}
    proofs.write(path, entries)
    assert proofs.read(path) == entries
    assert path.read_text().splitlines()[1] == "11  right  a.py::t"


RUN = """
import pytest

@pytest.mark.parametrize("what", ["right", "wrong"])
def test_trial(what, proven):
    assert proven(lambda: what, (b"input",)) == "right"

def test_without_a_proof():
    pass
"""


def test_only_what_passes_is_written(tmp_path):
    """By a run of pytest's own, with a worker; and the next run takes it."""
    (tmp_path / "test_trial.py").write_text(RUN)
    (tmp_path / "conftest.py").write_text(
        "from pathlib import Path\nfrom tests import proofs\n"
        f"proofs.ROOT, proofs.LEDGER = Path({str(tmp_path)!r}), Path({str(tmp_path / 'proofs.txt')!r})\n"
        'pytest_plugins = ("tests.proofs",)\n'
    )
    command = [sys.executable, "-m", "pytest", "-n", "1", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(proofs.ROOT)}
    name = "test_trial.py::test_trial[right]"
    seed = next(seed for seed in range(1000) if not drawn(name, seed))
    proven, said = {name: (sealed("right", (b"input",)), "right")}, []
    for more in ("--prove", f"--proof-seed={seed}", "--record"):
        done = subprocess.run([*command, more], env=environment, cwd=tmp_path, capture_output=True, text=True)
        said.append(done.stdout)
        assert proofs.read(tmp_path / "proofs.txt") == proven
        if more != "--prove":
            (tmp_path / "proofs.txt").unlink()
    assert "1 written to proofs.txt" in said[0] and "1 failed, 1 passed" in said[0], said[0]
    assert "1 run, 1 taken from the ledger" in said[1] and "1 failed, 2 passed" in said[1], said[1]
    assert "1 written to proofs.txt" in said[2] and "1 failed, 2 passed" in said[2], said[2]


@pytest.mark.parametrize(
    "text, same",
    [
        ('"""Others."""\n\ndef f(x):\n    """Words."""\n    return x + 1  # why\n', True),
        ('"""Doc."""\ndef f(x):\n    return x + 2\n', False),
        ('"""Doc."""\ndef f(x):\n    x\n    return x + 1\n', False),
    ],
)
def test_wording_means_nothing(tmp_path, text, same):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text('"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    second.write_text(text)
    assert (proofs.meaning(first) == proofs.meaning(second)) == same


def test_every_file_of_the_emulator_counts(tmp_path, monkeypatch):
    package = tmp_path / "cute_flash"
    (package / "emulator" / "ops").mkdir(parents=True)
    names = ("emulated_kernel.py", "emulator/machine.py", "emulator/ops/mma.py")
    for name in names:
        (package / name).write_text("a = 1\n")
    monkeypatch.setattr(proofs, "ROOT", tmp_path)
    seen = [proofs.emulator.__wrapped__()]
    for name in names:
        (package / name).write_text("a = 2\n")
        seen.append(proofs.emulator.__wrapped__())
    assert len(set(seen)) == 4


def test_kernels_operands_and_device_count():
    """Each of them is another proof; the same ones are the same proof every time."""
    plain = Subject(FULL, None, {})
    others = (
        Subject(replace(FULL, softmax_scale=0.5), None, {}),  # the same kernel on the same tensors
        Subject(replace(FULL, seqlens=((100, 299),)), None, {}),
        Subject(replace(FULL, mask="causal"), None, {}),
        replace(plain, options={"ctas_per_wave": 1}),
    )
    seals = [sealed("", dependencies(subject, "sm80")) for subject in (plain, plain, *others)]
    assert seals[0] == seals[1] and len(set(seals)) == 5
