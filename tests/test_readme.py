"""The README says what is so: its examples run, its table is the kernels' own, its files exist."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import pytest

import cute_flash
from tests.harness import where

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_examples_run(machine, tmp_path):
    """All Python examples, one after the other, as one file."""
    source = "\n".join(re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
    path = tmp_path / "examples.py"
    path.write_text(source)
    with where(machine):
        runpy.run_path(str(path), run_name="examples")


def test_table_is_computed():
    (table,) = re.findall(r"<!-- features -->\n(.*?)\n<!-- /features -->", README, re.DOTALL)
    assert table == cute_flash.features(), "run: python -m cute_flash features"


PATHS = sorted(set(re.findall(r"`((?:cute_flash|arch|tests|profiling)/[\w/.]*)`", README)))


@pytest.mark.parametrize("path", PATHS)
def test_files_exist(path):
    assert (ROOT / path).exists()


def test_every_variable_is_explained():
    """Each CUTE_FLASH_* variable that the code reads is in the README, and no others are."""
    sources = [p.read_text() for folder in ("cute_flash", "tests") for p in (ROOT / folder).rglob("*.py")]
    read = set(re.findall(r"""["'](CUTE_FLASH_[A-Z]+(?:_[A-Z]+)*)["'=]""", "\n".join(sources)))
    named = set(re.findall(r"CUTE_FLASH_[A-Z_]+", README))
    assert named == read, os.linesep.join(sorted(named ^ read))
