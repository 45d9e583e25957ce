"""Sizes, strides and numbers are run-time values: however they vary, one kernel is compiled per problem
and config, of which tuning has few.

The problems are those of tests/cases.py where they can be, so that a run compiles them once.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import cute_flash
from cute_flash import Causal, Document, PrefixLM, SlidingWindow, dispatch, executable, repeat
from cute_flash.arch.problem import Sizes
from tests.accuracy import assert_accurate
from tests.harness import where


@pytest.fixture
def counted():
    """How many kernels were needed, from disk or compiled, since the test began."""
    executable.executable.cache_clear()
    repeat.forget()
    yield lambda: executable.executable.cache_info().currsize
    executable.executable.cache_clear()


def tensors(batch, seqlen_q, seqlen_k, heads, heads_kv, place):
    generator = torch.Generator().manual_seed(batch + seqlen_q)
    shapes = ((seqlen_q, heads), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
    return [torch.randn(batch, *shape, 64, generator=generator).bfloat16().to(place) for shape in shapes]


def needed(answer, calls: list[Sizes]) -> int:
    """How many kernels tuning wants for calls of these sizes: one, unless few rows have their own config."""
    plans = [dispatch.plan(answer.problem, answer.device, sizes, 0) for sizes in calls]
    steps = {step.compiled for plan in plans for step in plan.steps}
    assert len(steps) <= len(dispatch.steps(answer.problem, answer.device))
    return len(steps)


SIZES = [  # batch, seqlen_q, seqlen_k, heads, heads_kv
    (2, 9, 30, 4, 2),
    (1, 64, 64, 2, 1),
    (3, 1, 130, 4, 1),
    (1, 129, 1, 6, 3),
    (2, 17, 0, 4, 2),
]


def test_dense_calls_of_any_size(counted, machine):
    place = "cuda" if machine == "cuda" else "cpu"
    with where(machine):
        answer = cute_flash.supports("bfloat16", 64, mask=Causal(), gqa=True, lse=True)
        for i, size in enumerate(SIZES):
            calls = [Sizes(b, h, kv, q, k) for b, q, k, h, kv in SIZES[: i + 1]]
            kernels = needed(answer, calls)
            q, k, v = tensors(*size, place)
            out, lse = cute_flash.flash_attn_func(q, k, v, causal=True, return_lse=True)
            assert_accurate(out.cpu(), lse.cpu(), (q.cpu(), k.cpu(), v.cpu()), causal=True)
            assert counted() == kernels, size


def test_without_a_cache_the_compiler_runs_as_often(counted, machine, monkeypatch):
    """Counted at the compiler: nothing comes from disk."""
    monkeypatch.setenv("CUTE_FLASH_CACHE", "0")
    before, place = len(executable.compiled), "cuda" if machine == "cuda" else "cpu"
    with where(machine):
        for size in ((2, 9, 30, 1, 1), (1, 20, 0, 2, 2), (3, 1, 130, 1, 1)):
            cute_flash.flash_attn_func(*tensors(*size, place), causal=True, return_lse=True)
            assert len(executable.compiled) - before == counted() == 1, size


def test_strides_scales_and_addresses(counted, machine):
    place = "cuda" if machine == "cuda" else "cpu"
    base = torch.randn(2, 24, 3, 4, 80, generator=torch.Generator().manual_seed(0)).bfloat16().to(place)
    with where(machine):
        for scale, cut in itertools.product((None, 0.7), (slice(0, 64), slice(16, 80))):
            q, k, v = base[..., cut].unbind(2)
            heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
            cute_flash.flash_attn_func(q, k, v, softmax_scale=scale, return_lse=True)
            cute_flash.flash_attn_func(q[:1, :5], heads_first[:1], v[:1], return_lse=True)
            assert counted() == 1


def test_packed_calls_of_any_lengths(counted, machine):
    place = "cuda" if machine == "cuda" else "cpu"
    calls: list[Sizes] = []
    with where(machine):
        answer = cute_flash.supports("bfloat16", 64, varlen=True, lse=True)
        for lengths in ([5, 0, 140], [131], [170, 3], [8] * 6 + [150]):
            calls.append(Sizes(len(lengths), 2, 2, max(lengths), max(lengths)))
            q, k, v = (tensor[0] for tensor in tensors(1, sum(lengths), sum(lengths), 2, 2, place))
            starts = torch.tensor([0, *lengths]).cumsum(0).int().to(place)
            longest = max(lengths)
            out, lse = cute_flash.flash_attn_varlen_func(
                q, k, v, starts, starts, longest, longest, return_lse=True
            )
            told = {"cu_seqlens_q": starts.cpu(), "cu_seqlens_k": starts.cpu()}
            assert_accurate(out.cpu(), lse.cpu(), (q.cpu(), k.cpu(), v.cpu()), **told)
            assert counted() == needed(answer, calls), lengths


def test_the_numbers_of_rules(counted, machine):
    """A rule's fields are run-time values; which rule it is, is compiled."""
    place = "cuda" if machine == "cuda" else "cpu"
    q, k, v = tensors(2, 140, 20, 2, 2, place)
    ids = torch.zeros(2, 50, dtype=torch.int32, device=place)
    calls = [
        *({"window_size": (left, right)} for left, right in ((3, 4), (0, 0), (99, 1))),
        *({"causal": True, "window_size": (left, -1)} for left in (2, 7)),
        *({"softcap": cap} for cap in (1.0, 30.0)),
        *({"mask": Document(table) & Causal()} for table in (ids, ids[:, :20].contiguous())),
        *({"mask": PrefixLM(n)} for n in (1, 9)),
        *({"alibi_slopes": torch.rand(2, device=place)} for _ in range(2)),
        *({"dropout_p": p} for p in (0.1, 0.5)),
    ]
    kinds = 6  # windows with both bounds, softcap, document and causal, prefix, slopes, dropout
    with where(machine):
        for options in calls:
            cute_flash.flash_attn_func(q, k, v, return_lse=True, **options)
    assert counted() == kinds


def test_another_problem_is_another_kernel(counted, machine):
    """The count does see a kernel that is compiled."""
    place = "cuda" if machine == "cuda" else "cpu"
    q, k, v = tensors(1, 140, 9, 2, 2, place)
    with where(machine):
        for number, mask in enumerate((None, Causal(), SlidingWindow(2, None)), start=1):
            cute_flash.flash_attn_func(q, k, v, mask=mask, return_lse=True)
            assert counted() == number
