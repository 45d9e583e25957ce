"""cuDNN front end's open forward kernel for sm_80 gives right answers here, as its backward kernels do.

Where its wheel is installed: it is not among the test's requirements, as it asks for a CUDA 13 compiler.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.emulator import test_conformance as forward
from tests.peers import cudnn_frontend, cudnn_frontend_forward

CASES = cudnn_frontend_forward.CASES


@pytest.mark.skipif(not cudnn_frontend.installed(), reason="needs the wheel nvidia-cudnn-frontend")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_right_answers(case):
    kernel, = forward.built_once(cudnn_frontend_forward, [case])[case.name].launches
    forward.check(kernel, forward.LATE)


def test_a_launch_over_fewer_keys_says_so():
    """The numbers behind the tensors: tiles of keys, scale, queries, keys, and the rest as it was."""
    told = [{"tensor": "q"}, None, 4, 0.1, 128, 256, 128, 0]
    assert cudnn_frontend_forward.sized(told, 2, 128) == [{"tensor": "q"}, None, 2, 0.1, 128, 128, 128, 0]


@pytest.mark.skipif(not cudnn_frontend.installed(), reason="needs the wheel nvidia-cudnn-frontend")
def test_another_scale_is_a_wrong_answer():
    (kernel,) = forward.built_once(cudnn_frontend_forward, [CASES[0]])[CASES[0].name].launches
    first = next(i for i, told in enumerate(kernel.arguments) if isinstance(told, float))
    wrong = [2 * told if i == first else told for i, told in enumerate(kernel.arguments)]
    with pytest.raises(AssertionError):
        forward.check(replace(kernel, arguments=wrong), forward.LATE)
