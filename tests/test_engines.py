"""Serving engines' halves that need no engine: reasons, and calls from what engines have, by its names."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

import cute_flash
from cute_flash.integrations import sglang, vllm
from tests.harness import call_of
from tests.serving import CASES

# vllm.v1.attention.backend.AttentionBackend.validate_configuration, of late 2026.
PUBLISHED = (
    "head_size", "dtype", "kv_cache_dtype", "block_size", "use_mla", "has_sink", "use_sparse",
    "use_mm_prefix", "use_per_head_quant_scales", "device_capability", "attn_type", "use_non_causal",
    "use_batch_invariant", "use_kv_connector",
)  # fmt: skip
SERVED = {
    "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, "use_mla": False,
    "has_sink": True, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
    "device_capability": (9, 0), "attn_type": "decoder",
}  # fmt: skip
UNSERVED = {
    "use_mla": (True, "MLA"),
    "use_sparse": (True, "sparse"),
    "use_mm_prefix": (True, "images"),
    "use_per_head_quant_scales": (True, "scales per head"),
    "kv_cache_dtype": ("fp8", "kv_cache_dtype fp8 is not served"),
    "attn_type": ("encoder", "attention type encoder"),
    "head_size": (260, "head_dim 260 is not in 8…256"),
    "dtype": (torch.float32, "dtype float32 is not one of"),
    "device_capability": ((7, 5), "kernels for compute capabilities"),
}


def test_the_arguments_are_the_published_ones():
    assert tuple(inspect.signature(vllm.reasons).parameters) == PUBLISHED


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0)])
@pytest.mark.parametrize("block_size", [None, 16, 1, 24])
def test_what_is_served_has_no_reasons(capability, block_size):
    given = SERVED | {"device_capability": capability, "block_size": block_size}
    told = {"use_non_causal": True, "use_batch_invariant": True, "use_kv_connector": True}
    assert vllm.reasons(**given, **told) == []


@pytest.mark.parametrize("name", UNSERVED)
def test_what_is_not_served_is_named(name):
    value, text = UNSERVED[name]
    found = vllm.reasons(**SERVED | {name: value})
    assert len(found) >= 1 and text in found[0]


@pytest.fixture
def batch():
    """Packed queries, keys in pages of 24, as both engines have them, and what the call gives by itself."""
    call = call_of(CASES["pages_24_varlen"])
    k, v, packing = call.cache()
    expected, _ = call.run("sm80")
    return SimpleNamespace(q=call.tensors["q"], k=k, v=v, packing=packing, expected=expected)


def test_vllm_calls_from_a_block_table(batch):
    """Tokens of padding, which a graph's batch has, are left alone."""
    q, tokens, packing = batch.q, len(batch.q), batch.packing
    output = torch.full((tokens + 3, *q.shape[1:]), 7.0, dtype=q.dtype)
    common = SimpleNamespace(
        num_actual_tokens=tokens, query_start_loc=packing.cu_seqlens_q, max_query_len=packing.max_seqlen_q,
        seq_lens=packing.seqused_k, max_seq_len=packing.max_seqlen_k, block_table_tensor=packing.block_table,
        causal=True,
    )  # fmt: skip
    padded = torch.cat((q, torch.full_like(q[:3], torch.nan)))
    with cute_flash.emulated("sm80"):
        assert vllm.attend(padded, batch.k, batch.v, output, common, scale=64**-0.5) is output
    assert torch.equal(output[:tokens], batch.expected) and (output[tokens:] == 7).all()


def test_vllm_shares_out_a_step_on_the_device(batch):
    """Metadata once, for several layers; that of another step is refused."""
    tokens, packing = len(batch.q), batch.packing
    common = SimpleNamespace(
        num_actual_tokens=tokens, query_start_loc=packing.cu_seqlens_q, max_query_len=packing.max_seqlen_q,
        seq_lens=packing.seqused_k, max_seq_len=packing.max_seqlen_k, block_table_tensor=packing.block_table,
        causal=True,
    )  # fmt: skip
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "block_size": 24, "dtype": batch.q.dtype}
    with cute_flash.emulated("sm80"):
        made = vllm.schedule(common, **sizes, num_splits=3)
        for _ in range(2):
            given = batch.q, batch.k, batch.v, torch.empty_like(batch.q), common
            output = vllm.attend(*given, scale=64**-0.5, scheduler_metadata=made)
        assert made.splits.tolist() != [1] * len(made.splits) and sorted(made.order) == list(range(5))
        common.max_query_len += 64
        with pytest.raises(ValueError, match="scheduler_metadata is for"):
            vllm.attend(*given, scale=64**-0.5, scheduler_metadata=made)
    assert torch.allclose(output, batch.expected, atol=2e-2)


def test_sglang_calls_from_a_page_table(batch):
    layer = SimpleNamespace(
        tp_q_head_num=4, head_dim=64, scaling=64**-0.5, logit_cap=0.0, sliding_window_size=-1
    )
    packing, pools = batch.packing, (batch.k.flatten(0, 1), batch.v.flatten(0, 1))
    metadata = SimpleNamespace(
        cache_seqlens_int32=packing.seqused_k, max_seq_len_q=packing.max_seqlen_q,
        cu_seqlens_q=packing.cu_seqlens_q, page_table=packing.block_table,
    )  # fmt: skip
    with cute_flash.emulated("sm80"):
        out = sglang.attend(batch.q.flatten(1), *pools, layer, metadata, page_size=24)
    assert torch.equal(out.view_as(batch.expected), batch.expected)
