"""Lists what nothing notices, sorted or not.

    python -m tests.emulator.negative [architecture [name of the kernel [part of a change's name]]]

A line per change of one kind: the seconds it took, and the sites that nothing objects to. "+" is on the list
of harmless ones, "?" is not, "-" is on it and is noticed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

from .harmless import HARMLESS
from .subjects import SUBJECTS
from .trial import ptx_of, unnoticed


def main(wanted: list[str]) -> None:
    wanted += [""] * (3 - len(wanted))
    for key in SUBJECTS:
        if not (key[0].startswith(wanted[0]) and wanted[1] in key[1]):
            continue
        for name in SUBJECTS[key].mutations:
            if wanted[2] in name:
                show(key, name)


def show(key: tuple[str, str], name: str) -> None:
    """One kind of change."""
    subject = SUBJECTS[key]
    mutants = list(subject.mutations[name].mutants(ptx_of(subject, key[0])))
    begun = time.monotonic()
    missed = unnoticed(subject, key[0], mutants)
    found = {number: line for number, line, _ in mutants if number in missed}
    reasons = HARMLESS.get((*key, name), {})
    took = time.monotonic() - begun
    print(f"{' '.join(key)}: {name}: {len(found)} of {len(mutants)} unnoticed, {took:.0f} s")
    for number, line in found.items():
        print(f"  {'+' if number in reasons else '?'} {number} (line {line})")
    for number in reasons.keys() - found.keys():
        print(f"  - {number}")
    sys.stdout.flush()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("CUTE_FLASH_CACHE", directory)
        main(sys.argv[1:])
