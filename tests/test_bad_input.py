"""Every bad input is refused by name, with what was given and what is allowed; nothing is launched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from cute_flash import ALiBi, Causal, Document, PrefixLM, Softcap, create_block_mask
from cute_flash.masks import Mask
from cute_flash.scores import Chain
from tests.refused import HALF, blocks, dense, ints, no_launch, packed, tensor  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_launch")


def test_the_unchanged_calls_would_be_launched():
    for call in (dense, packed):
        with pytest.raises(AssertionError, match="launched"):
            call()


@dataclass(frozen=True)
class Listed(Mask):
    allowed: Any

    def visible(self, q, k):
        return k <= q


class Undecorated(Mask):
    def visible(self, q, k):
        return k <= q


HELD = [1, 2]


def with_list(q, k):
    return HELD[k] <= q


# name -> (arguments, exception, what its text says)
DENSE = {
    "q_not_a_tensor": ({"q": [1.0]}, TypeError, r"q is list; allowed: torch\.Tensor"),
    "q_rank": ({"q": tensor(8, 4, 64)}, ValueError, r"q has shape \(8, 4, 64\); allowed: \(batch, seqlen"),
    "v_rank": ({"v": tensor(2, 16, 2, 64, 1)}, ValueError, r"v has shape .*; allowed: \(batch, seqlen"),
    "q_dtype": (
        {"q": tensor(2, 8, 4, 64, dtype=torch.float32)},
        TypeError,
        r"q has dtype torch.float32; allowed: torch.float16, torch.bfloat16",
    ),
    "k_dtype_differs": (
        {"k": tensor(2, 16, 2, 64, dtype=torch.bfloat16)},
        TypeError,
        r"k has dtype torch.bfloat16, q has torch.float16: they must be equal",
    ),
    "k_device": (
        {"k": torch.zeros(2, 16, 2, 64, dtype=HALF, device="meta")},
        ValueError,
        r"k is on meta, q is on cpu: they must be on one device",
    ),
    "batch": ({"k": tensor(3, 16, 2, 64), "v": tensor(3, 16, 2, 64)}, ValueError, "k has batch 3, q has 2"),
    "v_seqlen": (
        {"v": tensor(2, 15, 2, 64)},
        ValueError,
        r"v has shape \(2, 15, 2, 64\), k has \(2, 16, 2, 64\)",
    ),
    "v_heads": ({"v": tensor(2, 16, 4, 64)}, ValueError, r"v has shape \(2, 16, 4, 64\), k has \(2, 16, 2"),
    "k_head_dim": ({"k": tensor(2, 16, 2, 32)}, ValueError, "k has head_dim 32, q has 64"),
    "gqa": (
        {"k": tensor(2, 16, 3, 64), "v": tensor(2, 16, 3, 64)},
        ValueError,
        "q has 4 heads, k has 3: q's must be a multiple",
    ),
    "no_kv_heads": (
        {"k": tensor(2, 16, 0, 64), "v": tensor(2, 16, 0, 64)},
        ValueError,
        "q has 4 heads, k has 0",
    ),
    "alibi_dtype": (
        {"alibi_slopes": tensor(4)},
        TypeError,
        "alibi_slopes has dtype torch.float16; allowed: torch.float32",
    ),
    "alibi_shape": (
        {"alibi_slopes": torch.zeros(3)},
        ValueError,
        r"ALiBi.slopes has shape \(3,\); allowed: heads 4",
    ),
    "alibi_batch": (
        {"alibi_slopes": torch.zeros(3, 4)},
        ValueError,
        r"shape \(3, 4\); allowed: heads 4 or batch 2, heads 4",
    ),
    "alibi_strided": ({"alibi_slopes": torch.zeros(8)[::2]}, ValueError, r"alibi_slopes has strides \(2,\)"),
    "sink_shape": (
        {"learnable_sink": torch.zeros(2)},
        ValueError,
        "learnable_sink has 2 numbers; allowed: 4",
    ),
    "sink_dtype": (
        {"learnable_sink": torch.zeros(4).double()},
        TypeError,
        "learnable_sink has dtype torch.float64; allowed",
    ),
    "sink_device": (
        {"learnable_sink": torch.zeros(4, device="meta")},
        ValueError,
        "learnable_sink is on meta",
    ),
    "mask_class": ({"mask": Causal}, TypeError, r"mask is <class .*Causal'> \(type\); allowed: a Mask"),
    "mask_tensor": (
        {"mask": torch.ones(8, 16)},
        TypeError,
        r"mask is tensor.*\(Tensor\); allowed: a Mask object",
    ),
    "mask_is_a_score": ({"mask": Softcap(1.0)}, TypeError, r"mask is Softcap\(cap=1.0\).*a Mask object"),
    "mask_arguments": ({"mask": lambda q: q}, TypeError, r"mask is .*<lambda>\(q\); allowed: .*\(q, k\)"),
    "mask_uses_a_list": (
        {"mask": with_list},
        TypeError,
        r"with_list cannot be compiled: k is no number yet: .*index of a list",
    ),
    "mask_field": ({"mask": Listed([1])}, TypeError, r"Listed.allowed is \[1\] \(list\); a rule's fields"),
    "mask_undecorated": ({"mask": Undecorated()}, TypeError, r"Undecorated is no dataclass: .*frozen=True"),
    "score_arguments": (
        {"score": lambda s, q, k: s},
        TypeError,
        r"allowed: a function of \(s, batch, head, q, k",
    ),
    "document_short": (
        {"mask": Document(torch.zeros(2, 8, dtype=torch.int32))},
        ValueError,
        r"Document.ids has shape \(2, 8\); allowed: batch 2, seqlen_k 16",
    ),
    "document_inside_both": (
        {"mask": Causal() & Document(torch.zeros(3, 16, dtype=torch.int32))},
        ValueError,
        r"Document.ids has shape \(3, 16\)",
    ),
    "document_dtype": (
        {"mask": Document(torch.zeros(2, 16, dtype=torch.float64))},
        TypeError,
        "Document.ids has dtype torch.float64; allowed",
    ),
    "prefix_device": (
        {"mask": PrefixLM(torch.zeros(2, dtype=torch.int32, device="meta"))},
        ValueError,
        "PrefixLM.prefix is on meta",
    ),
    "score_table_shape": ({"score": ALiBi(torch.zeros(5))}, ValueError, r"ALiBi.slopes has shape \(5,\)"),
    "out_shape": (
        {"out": tensor(2, 8, 4, 32)},
        ValueError,
        r"out has shape .*32\); allowed: \(2, 8, 4, 64\)",
    ),
    "out_dtype": (
        {"out": tensor(2, 8, 4, 64, dtype=torch.float32)},
        TypeError,
        "out has dtype torch.float32",
    ),
    "out_device": (
        {"out": torch.zeros(2, 8, 4, 64, dtype=HALF, device="meta")},
        ValueError,
        "out is on meta",
    ),
    "out_not_a_tensor": ({"out": 3}, TypeError, "out is int; allowed"),
    "head_dim_step": (
        {"q": tensor(2, 8, 4, 60), "k": tensor(2, 16, 2, 60), "v": tensor(2, 16, 2, 60)},
        NotImplementedError,
        r"sm80.forward: head_dim 60 is not in 8…576 in steps of 8",
    ),
    "head_dim_large": (
        {"v": tensor(2, 16, 2, 584)},
        NotImplementedError,
        "head_dim_v 584 is not in 8…576",
    ),
    "q_last_dim_strided": (
        {"q": tensor(2, 8, 64, 4).transpose(2, 3)},
        ValueError,
        r"q has strides \(.*, 1, 4\): the last dimension must be contiguous",
    ),
    "k_strides": (
        {"k": tensor(2, 16, 2, 68)[..., :64]},
        ValueError,
        r"k has strides \(.*, 68, 1\): all but the last must be multiples of 16 bytes, 8 elements",
    ),
    "v_misaligned": (
        {"v": tensor(2 * 16 * 2 * 64 + 1)[1:].view(2, 16, 2, 64)},
        ValueError,
        r"v begins at address 0x.*: it must be a multiple of 16 bytes",
    ),
    "out_misaligned": (
        {"out": tensor(2 * 8 * 4 * 64 + 4)[4:].view(2, 8, 4, 64)},
        ValueError,
        "out begins at address",
    ),
    "q_requires_grad": (
        {"q": tensor(2, 8, 4, 64).requires_grad_(), "out": tensor(2, 8, 4, 64)},
        NotImplementedError,
        "out is given where a gradient is required",
    ),
    "sink_requires_grad": (
        {"learnable_sink": torch.zeros(4).requires_grad_(), "out": tensor(2, 8, 4, 64)},
        NotImplementedError,
        "out is given where a gradient is required",
    ),
    "table_requires_grad": (
        {"score": ALiBi(torch.zeros(4).requires_grad_())},
        NotImplementedError,
        r"^ALiBi\.slopes requires a gradient, and a rule's tensors get none: call within torch",
    ),
    "alibi_slopes_require_grad": (
        {"alibi_slopes": torch.zeros(4).requires_grad_()},
        NotImplementedError,
        "^alibi_slopes requires a gradient, and a rule's tensors get none",
    ),
    "table_in_a_chain_requires_grad": (
        {"score": Chain((Softcap(3.0), ALiBi(torch.zeros(4).requires_grad_())))},
        NotImplementedError,
        r"^ALiBi\.slopes requires a gradient",
    ),
    "block_mask_type": (
        {"block_mask": torch.ones(1, 1, dtype=torch.bool)},
        TypeError,
        "block_mask is Tensor; allowed: a BlockMask, from create_block_mask or BlockMask.from_blocks",
    ),
    "block_mask_seqlens": (
        {"block_mask": create_block_mask(Causal(), 2, 4, 8, 17)},
        ValueError,
        r"block_mask is for seqlen_q and seqlen_k \(8, 17\), q and k have \(8, 16\)",
    ),
    "block_mask_batch": (
        {"block_mask": blocks(3, 1)},
        ValueError,
        r"block_mask.counts has shape \(3, 1, 1, 2\); allowed: \(1 or 2, 1 or 4, 1, 2\)",
    ),
    "block_mask_heads": ({"block_mask": blocks(1, 2)}, ValueError, r"shape \(1, 2, 1, 2\); allowed: \(1"),
    "block_mask_device": ({"block_mask": blocks(1, 1).to("meta")}, ValueError, "mask.counts is on meta"),
    "block_mask_counts_dtype": (
        {"block_mask": replace(blocks(1, 1), counts=torch.zeros(1, 1, 1, 2))},
        TypeError,
        "block_mask.counts has dtype torch.float32; allowed: torch.int32",
    ),
    "block_mask_indices_shape": (
        {"block_mask": replace(blocks(1, 1), indices=ints(0, 0).view(2, 1, 1, 1))},
        ValueError,
        r"block_mask.indices has shape \(2, 1, 1, 1\); allowed: \(1, 1, 1, 1 or more\)",
    ),
    "block_mask_counts": (
        {"block_mask": replace(blocks(1, 1), counts=ints(1, 1).view(1, 1, 1, 2))},
        ValueError,
        "block_mask.counts has numbers from 1 and sums up to 2; allowed: from 0, sums up to 1",
    ),
    "block_mask_indices": (
        {"block_mask": replace(blocks(1, 1), indices=ints(1).view(1, 1, 1, 1))},
        ValueError,
        "block_mask.indices has numbers from 1 to 1; allowed: 0 to 0",
    ),
    "block_mask_full_beyond_the_end": (
        {"block_mask": replace(blocks(1, 1), counts=ints(0, 1).view(1, 1, 1, 2))},
        ValueError,
        "block_mask.indices has 0, which reaches beyond the 16 keys, as a full block",
    ),
    "block_mask_and_rules": (
        {"block_mask": blocks(1, 1), "causal": True, "mask": Causal()},
        ValueError,
        "causal and mask is given beside block_mask, .*; allowed: a block mask made of all rules",
    ),
    "block_mask_and_window": (
        {"block_mask": blocks(1, 1), "window_size": (3, -1)},
        ValueError,
        "window_size is given beside block_mask",
    ),
    "block_mask_table": (
        {"block_mask": replace(blocks(1, 1), mask=PrefixLM(ints(1, 2, 3)))},
        ValueError,
        r"PrefixLM.prefix has shape \(3,\); allowed: batch 2",
    ),
    "block_size": (
        {"block_mask": create_block_mask(Causal(), 2, 4, 8, 16, block_size=(96, 100))},
        NotImplementedError,
        r"block_size \(96, 100\) is a multiple of no tile; allowed: multiples of \(64, 64\), \(128, 48\)",
    ),
}

@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    changed, error, text = DENSE[name]
    with pytest.raises(error, match=text):
        dense(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"q": tensor(2, 8, 4, 192)[..., 64:128]},  # a slice of packed q, k and v
        {"q": tensor(2, 4, 8, 64).transpose(1, 2)},
        {"k": tensor(1, 16, 2, 64).expand(2, -1, -1, -1)},
        {
            "q": tensor(1, 8, 4, 64),
            "k": tensor(1, 16, 2, 64),
            "v": tensor(1, 16, 2, 64).as_strided((1, 16, 2, 64), (3, 128, 64, 1)),
        },  # the stride of a dimension of size 1 is never used
        {"mask": Document(torch.zeros(2, 99, dtype=torch.int32))},
        {"window_size": (None, -1), "dropout_p": 0, "softcap": 0, "softmax_scale": 2},
        {"learnable_sink": torch.zeros(4, dtype=torch.bfloat16)},
    ],
)
def test_unusual_but_right(changed):
    with pytest.raises(AssertionError, match="launched"):
        dense(**changed)


def test_gradients_are_no_matter_without_grad_mode():
    with torch.no_grad(), pytest.raises(AssertionError, match="launched"):
        dense(q=tensor(2, 8, 4, 64).requires_grad_())
