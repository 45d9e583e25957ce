"""Bad packed calls are refused by name, and bad numbers inside tensors where these can be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from cute_flash import Document, contents, request
from tests.refused import blocks, ints, no_launch, packed, tensor  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_launch")

# name -> (arguments, exception, what its text says)
PACKED = {
    "block_mask": (
        {"block_mask": blocks(1, 1)},
        NotImplementedError,
        "block_mask is given; allowed for packed sequences: None, for its blocks are of one seqlen_q",
    ),
    "q_rank": (
        {"q": tensor(1, 10, 4, 64)},
        ValueError,
        r"q has shape .*; allowed: \(total, heads, head_dim\)",
    ),
    "cu_dtype": (
        {"cu_seqlens_q": ints(0, 4, 10).long()},
        TypeError,
        "cu_seqlens_q has dtype torch.int64; allowed: torch.int32",
    ),
    "cu_list": ({"cu_seqlens_k": [0, 15, 20]}, TypeError, "cu_seqlens_k is list"),
    "cu_rank": ({"cu_seqlens_q": ints(0, 4, 10)[None]}, ValueError, r"cu_seqlens_q has shape \(1, 3\)"),
    "cu_empty": ({"cu_seqlens_q": ints()}, ValueError, "cu_seqlens_q is empty"),
    "cu_strided": (
        {"cu_seqlens_q": ints(0, 0, 4, 4, 10, 10)[::2]},
        ValueError,
        r"cu_seqlens_q has strides \(2,\)",
    ),
    "cu_counts": ({"cu_seqlens_k": ints(0, 20)}, ValueError, "cu_seqlens_q has 3 numbers and cu_seqlens_k 2"),
    "cu_start": (
        {"cu_seqlens_q": ints(1, 4, 10)},
        ValueError,
        "cu_seqlens_q starts with 1; it must start with 0",
    ),
    "cu_decreasing": ({"cu_seqlens_k": ints(0, 15, 12)}, ValueError, "cu_seqlens_k decreases from 15 to 12"),
    "cu_beyond": (
        {"cu_seqlens_q": ints(0, 4, 11)},
        ValueError,
        "cu_seqlens_q ends with 11, the tensor has 10 rows",
    ),
    "max_q": ({"max_seqlen_q": 5}, ValueError, "max_seqlen_q is 5, the longest sequence has 6"),
    "max_k": ({"max_seqlen_k": 14}, ValueError, "max_seqlen_k is 14, the longest sequence has 15"),
    "used_shape": ({"seqused_k": ints(1)}, ValueError, "seqused_k has 1 numbers, cu_seqlens has 2 sequences"),
    "used_dtype": ({"seqused_q": ints(1, 1).long()}, TypeError, "seqused_q has dtype torch.int64"),
    "used_large": ({"seqused_k": ints(15, 6)}, ValueError, r"seqused_k\[1\] is 6; allowed: 0 to 5"),
    "used_negative": ({"seqused_q": ints(-1, 6)}, ValueError, r"seqused_q\[0\] is -1; allowed: 0 to 4"),
    "document_short": (
        {"mask": Document(torch.zeros(2, 14, dtype=torch.int32))},
        ValueError,
        "allowed: batch 2, seqlen_k 15",
    ),
    "attn_probs": ({"return_attn_probs": True}, NotImplementedError, "return_attn_probs is True; allowed"),
    "alignment": (
        {"k": tensor(20 * 2 * 64 + 2)[2:].view(20, 2, 64)},
        ValueError,
        "k begins at address",
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed(name):
    changed, error, text = PACKED[name]
    with pytest.raises(error, match=text):
        packed(**changed)


def test_rows_beyond_the_last_sequence_are_allowed():
    with pytest.raises(AssertionError, match="launched"):
        packed(cu_seqlens_q=ints(0, 4, 9))


class OnTheGpu:
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __getattr__(self, name: str) -> Any:
        return getattr(self.held, name)


def calls_with_wrong_numbers() -> Iterator[tuple[request.Call, str]]:
    """Calls that cannot be told from right ones without reading tensors, and what is said of them."""
    options = request.Options(0.0, None, False, (-1, -1), 0.0, None, None, None, None, False, None)
    packing = request.Packing(ints(1, 4, 10), ints(0, 15, 20), 6, 15, None, None)
    yield request.varlen(*map(tensor, (10, 20, 20), (4, 2, 2), (64,) * 3), packing, options), "starts with 1"
    wrong = replace(blocks(1, 1), indices=ints(7).view(1, 1, 1, 1))
    dense = (tensor(2, 8, 4, 64), tensor(2, 16, 2, 64), tensor(2, 16, 2, 64))
    yield request.dense(*dense, options._replace(block_mask=wrong)), "indices has numbers from 7 to 7"


@pytest.mark.parametrize("call, text", list(calls_with_wrong_numbers()), ids=["packed", "blocks"])
@pytest.mark.parametrize("asked, capturing, checked", [(None, 0, 0), ("0", 0, 0), ("1", 0, 1), ("1", 1, 0)])
def test_numbers_on_the_gpu_are_checked_where_asked(monkeypatch, call, text, asked, capturing, checked):
    out = torch.zeros_like(call.q)
    call = call._replace(q=OnTheGpu(call.q))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.delenv("CUTE_FLASH_CHECK", raising=False)
    if asked is not None:
        monkeypatch.setenv("CUTE_FLASH_CHECK", asked)
    expected = pytest.raises(ValueError, match=text) if checked else contextlib.nullcontext()
    with expected:
        contents.check(call, out)
