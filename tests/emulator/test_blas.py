"""The emulator's matrix products run on one thread, and leave the process as it was."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator.base import blas


@pytest.mark.skipif(
    "openblas" not in np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"],
    reason="numpy computes with another library",
)
def test_one_thread_inside_and_as_before_outside():
    controls = blas._controls()
    before = [get() for get, _ in controls]
    assert before
    with pytest.raises(ZeroDivisionError), blas.one_thread():
        assert [get() for get, _ in controls] == [1] * len(before)
        raise ZeroDivisionError
    assert [get() for get, _ in controls] == before
