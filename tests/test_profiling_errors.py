"""The timing model's errors: how they are kept, where they are told, and which of them no model escapes."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("nvidia.cu13", reason="nvdisasm comes with NVIDIA's packages on PyPI")

from profiling import record
from profiling.timing import grid, published, validate


def test_errors_are_kept(tmp_path, monkeypatch):
    """A new one in the place of the older one."""
    monkeypatch.setattr(validate, "JSON", tmp_path / "validation.json")
    row = validate.Error("H200", "fwd", 0.01, 3, 0.02, 4, 1443.0)
    for kept in (row, replace(row, held=0.2)):
        validate.write_errors([kept])
        assert validate.read_errors() == [kept]
        assert kept.holds == (kept.held < 0.1)


def test_the_readme_has_the_errors_that_are_kept():
    said = (record.RESULTS.parent / "README.md").read_text()
    assert len(validate.read_errors()) > 4
    for it in validate.read_errors():
        name = f"{it.gpu} {'forward' if it.kind == 'fwd' else 'backward'}"
        tuned, held = (f"{100 * part:.1f} % of" for part in (it.tuned, it.held))
        beyond = "" if it.holds else ", beyond the bar"
        cells = f"| {name} | {tuned} {it.tuned_rows} | {held} {it.held_rows}{beyond} | {it.clock:.0f} MHz |"
        assert cells in said


def test_what_was_published_twice_is_missed_by_any_model():
    shape = grid.Shape(1, 1024, 1024, 16, 16, (128, 128), False)
    one = published.Row("H200", "FA4", "1", "fwd", "bfloat16", shape, 500.0, "")
    text = next(text for text in map(str, range(99)) if not replace(one, text=text).tuned)
    rows = [replace(one, text=text, tflops=rate) for rate in (500.0, 400.0)]
    assert validate.least([validate.Predicted(row, 1.0) for row in rows], "H200") == pytest.approx(0.1)
    assert validate.least([], "H200") == 0
