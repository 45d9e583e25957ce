"""Head dims beyond 256, and latent attention: V is the first columns of a cache's K (MLA, absorbed)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import cute_flash
from cute_flash import dispatch, latent
from cute_flash.arch.kernel import Step
from cute_flash.arch.problem import KvCache, Sizes
from cute_flash.arch.sm90 import LATENT as HOPPERS
from cute_flash.arch.sm100 import LATENT as BLACKWELLS
from tests.accuracy import assert_accurate
from tests.cases import Case
from tests.harness import answer_for, call_of, where
from tests.orders import hold
from tests.serving import cached
from tests.test_kv_cache import Asked
from tests.test_resources import EXTREMES, assert_in_registers, prove

MLA = (576, 512)
WIDE = {
    case.name: case
    for case in (
        Case("mla", ((40, 77),), dims=MLA, mask="causal", heads=(2, 1)),
        Case("uneven", ((33, 70), (5, 100)), dims=(264, 296), varlen=True, mask="window", score="alibi"),
        Case("equal", ((20, 90),), dims=(512, 512), dtype="float16", dropout=0.2, sink=True),
        Case("narrow_v", ((30, 150),), dims=(576, 8), mask="own", score="own_softcap"),
        Case("narrow_k", ((30, 150),), dims=(8, 320), mask="document"),
        Case("split", ((3, 300),), dims=MLA, splits=3, heads=(4, 1)),
        Case("blocks", ((140, 150),), dims=(320, 264), blocks="causal"),
    )
}
LATENT = KvCache(latent=True)
OWN = {"sm90": HOPPERS, "sm100": BLACKWELLS}  # kernels for latent attention alone
SHARED = {
    case.name: case
    for case in (
        cached("rows", cache=LATENT, dims=MLA, seqlens=((1, 150), (1, 7), (1, 0)), heads=(6, 1)),
        cached("causal", cache=LATENT, dims=(320, 256), seqlens=((20, 150), (20, 77)), mask="causal"),
        cached("long", cache=LATENT, dims=MLA, seqlens=((70, 600), (70, 330)), mask="window"),
        cached("large", cache=LATENT, dims=(320, 128), seqlens=((40, 300),), softmax_scale=2048.0),
        cached("many_heads", cache=LATENT, dims=(320, 256), seqlens=((2, 150), (2, 30)), heads=(100, 1)),
        cached(
            "heads", cache=KvCache(8, latent=True), dims=(512, 512), heads=(40, 2), mask="causal",
            seqlens=((3, 150), (3, 70)), score="softcap", sink=True, dtype="float16",
        ),
        cached(
            "moved", dims=(288, 64), seqlens=((3, 100), (40, 33), (0, 7)), varlen=True, mask="window",
            score="softcap", cache=KvCache(batch_idx=True, leftpad=True, latent=True), heads=(2, 1),
        ),
        cached("pages_16", cache=KvCache(16, latent=True), dims=MLA, seqlens=((2, 200), (2, 60)), splits=3),
        cached(
            "pages_7", cache=KvCache(7, latent=True), dims=(264, 256), heads=(8, 2), mask="causal",
            seqlens=((5, 130), (5, 5)), dtype="float16",
        ),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_wide_heads(name, machine):
    call_of(WIDE[name]).check(machine)


@pytest.mark.parametrize("name", ["mla", "split"])
def test_wide_heads_with_little_shared_memory(name):
    assert answer_for(WIDE[name], "sm86").config.tile_m == 32
    call_of(WIDE[name]).check("sm86")


@pytest.mark.parametrize("name", SHARED)
def test_latent(name, machine):
    call_of(SHARED[name]).check(machine)


@pytest.mark.parametrize("name", ["rows", "pages_7", "mla"])
def test_any_order_of_events(name, arch, proven):
    case = (WIDE | SHARED)[name]
    hold(case, arch, proven, asynchrony="late", schedule="random", seed=1, races=True)


def rows_of(batch: int, keys: int, dims=MLA, seed: int = 0) -> torch.Tensor:
    """A cache's rows, normal numbers and then, as room, NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(batch, keys + 9, 1, dims[0], generator=generator).bfloat16()
    rows[:, keys:] = math.nan
    return rows


def decode(q, rows, dim_v, lengths, **options):
    """(out, lse) of a call on the rows of a latent cache."""
    given = {"cache_seqlens": lengths, "return_softmax_lse": True, **options}
    return cute_flash.flash_attn_with_kvcache(q, rows, rows[..., :dim_v], **given)


INVARIANT = {"causal": True, "batch_invariant": True}


@pytest.mark.parametrize("options", [{}, {"num_splits": 3}, INVARIANT], ids=str)
def test_heads_of_one_query_fill_a_tile(options, machine):
    """As queries of one head, whose tile they share: 20 heads take no more tiles than one."""
    rows, lengths = rows_of(2, 100), torch.tensor([100, 37], dtype=torch.int32)
    q = torch.randn(2, 1, 20, MLA[0], generator=torch.Generator().manual_seed(2)).bfloat16()
    with where(machine):
        out, lse = decode(q, rows, MLA[1], lengths, **options)
    k = rows.clone()
    for keys, length in zip(k, lengths.tolist(), strict=True):
        keys[length:] = math.nan
    assert out.shape == (2, 1, 20, MLA[1]) and lse.shape == (2, 20, 1)
    assert_accurate(out, lse, (q, k, k[..., : MLA[1]]), seqused_k=lengths)


@pytest.mark.parametrize("tree", OWN)
@pytest.mark.parametrize(
    "dims, page_size, own",
    [
        (MLA, None, True), (MLA, 8, True), ((320, 128), 64, True), (MLA, 7, False), ((264, 128), None, False),
        ((320, 64), None, False),
    ],
)  # fmt: skip
def test_a_kernel_of_its_own_serves_what_tensor_cores_and_tma_take(dims, page_size, own, tree):
    case = cached("", cache=KvCache(page_size, latent=True), dims=dims, seqlens=((1, 90),), heads=(4, 1))
    assert answer_for(case, tree).kernel.name == (OWN[tree].name if own else "sm80.forward")


@pytest.mark.parametrize("tree", OWN)
def test_a_kernel_of_its_own_says_what_it_is_not_for(tree):
    problem = replace(answer_for(SHARED["rows"], tree).problem, head_dim=264, head_dim_v=64, cache=None)
    assert set(OWN[tree].reasons(problem, dispatch.EMULATED[tree])) == {
        "head_dim 264 is not in 128…576 in steps of 64", "head_dim_v 64 is not in 128…576 in steps of 64",
        "serves only V that is K's first columns", "head_dim_v 64 is not a multiple of 128",
    }  # fmt: skip


def test_out_is_written_where_it_is_asked_for(machine):
    rows, lengths = rows_of(1, 40), torch.tensor([40], dtype=torch.int32)
    q, out = torch.randn(1, 1, 4, MLA[0]).bfloat16(), torch.full((1, 1, 4, MLA[1]), math.nan).bfloat16()
    with where(machine):
        expected, _ = decode(q, rows, MLA[1], lengths)
        found, _ = decode(q, rows, MLA[1], lengths, out=out)
    assert found is out and torch.equal(out, expected)


def test_every_row_is_asked_for_once(machine):
    """K and V of 64 heads: as many bytes as the rows in use have. A pair on sm100 asks L2 for V once more."""
    if machine == "cuda":
        pytest.skip("counted by the emulator")
    keys, rows = 96, rows_of(1, 96)
    q, watch = torch.randn(1, 1, 64, MLA[0]).bfloat16(), Asked(rows)
    with where(machine, observers=(watch,)):
        decode(q, rows, MLA[1], torch.tensor([keys], dtype=torch.int32), num_splits=3)
    assert watch.bytes == keys * (sum(MLA) if machine == "sm100" else MLA[0]) * 2


@pytest.mark.parametrize("packed", [False, True])
def test_qv_is_the_first_part_of_a_row(packed, machine):
    """FlashAttention-3's form of it: the same bits as q of both parts."""
    rows, lengths = rows_of(2, 50), torch.tensor([50, 21], dtype=torch.int32)
    q = torch.randn(2, 3, 4, MLA[0], generator=torch.Generator().manual_seed(3)).bfloat16()
    told = {"cache_seqlens": lengths, "causal": True, "return_softmax_lse": True}
    if packed:
        q = q.flatten(0, 1)
        told |= {"cu_seqlens_q": torch.tensor([0, 3, 6], dtype=torch.int32), "max_seqlen_q": 3}
    latents, rotated = rows[..., : MLA[1]], rows[..., MLA[1] :]
    with where(machine):
        expected = cute_flash.flash_attn_with_kvcache(q, rows, latents, **told)
        qv, q = q[..., : MLA[1]], q[..., MLA[1] :]
        found = cute_flash.flash_attn_with_kvcache(q, rotated, latents, qv=qv, **told)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("queries, heads", [(1, 20), (2, 4)])
def test_metadata(queries, heads, machine):
    rows, lengths = rows_of(2, 100), torch.tensor([100, 9], dtype=torch.int32)
    q = torch.randn(2, queries, heads, MLA[0]).bfloat16()
    with where(machine):
        made = cute_flash.get_scheduler_metadata(
            2, queries, rows.shape[1], heads, 1, MLA[0], lengths, headdim_v=MLA[1], causal=True,
            latent=True, num_splits=3,
        )  # fmt: skip
        expected = decode(q, rows, MLA[1], lengths, causal=True, num_splits=3)
        out, lse = decode(q, rows, MLA[1], lengths, causal=True, scheduler_metadata=made)
    assert torch.allclose(out, expected[0], atol=2e-2) and torch.allclose(lse, expected[1], atol=1e-4)


def test_what_is_latent():
    rows = torch.zeros(2, 9, 1, 576, dtype=torch.float16)
    assert latent.is_latent(rows, rows[..., :512]) and latent.is_latent(rows, rows)
    assert not latent.is_latent(rows, rows[..., :500]), "no whole blocks of columns"
    assert not latent.is_latent(rows, rows[..., :512].clone())
    assert not latent.is_latent(rows, rows[..., 64:]), "its last columns"
    assert not latent.is_latent(rows[..., :256], rows[..., :64]), "other kernels serve that"
    assert not latent.is_latent(rows.to("meta"), rows.to("meta"))


def test_a_call_like_an_earlier_one_may_be_latent_or_not(machine):
    """Shapes and strides are the same; what was decided is not."""
    rows, lengths = rows_of(1, 30, (320, 64)), torch.tensor([30], dtype=torch.int32)
    q, other = torch.randn(1, 2, 1, 320).bfloat16(), rows_of(1, 30, (320, 64), seed=5)[..., :64]
    with where(machine):
        for v in (rows[..., :64], other, rows[..., :64]):
            out, lse = cute_flash.flash_attn_with_kvcache(
                q, rows, v, cache_seqlens=lengths, return_softmax_lse=True
            )
            assert_accurate(out, lse, (q, rows, v), seqused_k=lengths)


ROWS = torch.zeros(2, 9, 1, 320, dtype=torch.float16)
Q, QV = torch.zeros(2, 1, 4, 64, dtype=torch.float16), torch.zeros(2, 1, 4, 256, dtype=torch.float16)
BAD = {
    "shape": ({"qv": QV[..., :64]}, ValueError, r"qv has shape \(2, 1, 4, 64\); allowed: \(2, 1, 4, 256\)"),
    "rank": ({"qv": QV[0]}, ValueError, r"qv has shape \(1, 4, 256\); allowed: 4 dimensions, qv as q"),
    "dtype": ({"qv": QV.float()}, ValueError, "qv is torch.float32 on cpu, q torch.float16 on cpu"),
    "type": ({"qv": 3}, TypeError, "qv is int; allowed: torch.Tensor"),
    "apart": ({"k_cache": ROWS[..., :64]}, ValueError, "k_cache does not lie behind v_cache in"),
    "rows": (
        {"k_cache": ROWS[:1, :, :, 256:]}, ValueError,
        r"v_cache has shape \(2, 9, 1, 256\), k_cache has \(1, 9, 1, 64\): they must be equal but",
    ),
    "new": ({"k": Q[:, :, :1], "v": QV[:, :, :1]}, NotImplementedError, "k is given beside qv; allowed: "),
}


def test_metadata_of_rows_that_no_kernel_reads_once():
    for head_dims in ((128, 64), (576, 500), (320, 384)):
        told = {"headdim": head_dims[0], "headdim_v": head_dims[1], "latent": True}
        refused = pytest.raises(ValueError, match=f"latent is True with headdim {head_dims[0]} and headdim_v")
        with cute_flash.emulated("sm80"), refused:
            cute_flash.get_scheduler_metadata(
                1, 1, 64, 4, 1, cache_seqlens=torch.ones(1, dtype=torch.int32), **told
            )


def test_within_torch_compile():
    """A traced call is as one that is not, without heads as rows; qv is refused there."""
    rows, lengths = rows_of(1, 30, (320, 64)), torch.tensor([30], dtype=torch.int32)
    q = torch.randn(1, 1, 2, 320, generator=torch.Generator().manual_seed(4)).bfloat16()

    def attend(q, rows):
        return cute_flash.flash_attn_with_kvcache(q, rows, rows[..., :64], cache_seqlens=lengths)

    def by_parts(q, rows):
        parts = {"k_cache": rows[..., 64:], "v_cache": rows[..., :64], "qv": q[..., :64]}
        return cute_flash.flash_attn_with_kvcache(q[..., 64:], **parts, cache_seqlens=lengths)

    with cute_flash.emulated("sm80"):
        traced = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, rows)
        assert torch.allclose(traced, attend(q, rows), atol=2e-2)
        with pytest.raises(Exception, match="qv is given while torch.compile traces"):
            torch.compile(by_parts, backend="aot_eager", fullgraph=True)(q, rows)


@pytest.mark.parametrize("name", BAD)
def test_wrong(name):
    changed, error, text = BAD[name]
    given = {"q": Q, "qv": QV, "k_cache": ROWS[..., 256:], "v_cache": ROWS[..., :256], "cache_seqlens": 3}
    with cute_flash.emulated("sm80"), pytest.raises(error, match=text):
        cute_flash.flash_attn_with_kvcache(**given | changed)


def test_gradients_of_wide_heads_are_refused():
    q = torch.zeros(1, 8, 1, 320, dtype=torch.float16, requires_grad=True)
    refused = pytest.raises(NotImplementedError, match="head_dim 320 is not in 8…256")
    with cute_flash.emulated("sm80"), refused:
        cute_flash.flash_attn_func(q, q, q)


# Where the fewest registers are left, with a page to look up or a rule to compute.
@pytest.mark.parametrize("device", ["sm80", "sm90", "sm100", "sm120"])
@pytest.mark.parametrize("extreme", ["light", "heavy"])
@pytest.mark.parametrize("dims", [MLA, (576, 576)], ids=str)
def test_nothing_spills(dims, extreme, device, tmp_path, proven):
    answer = answer_for(replace(EXTREMES[extreme], dims=dims), device)
    kinds = (None, KvCache(16), KvCache(16, latent=True)) if extreme == "light" else (None,)
    problems = (replace(answer.problem, cache=cache) for cache in kinds)
    sizes = Sizes(2, 16, 1, 300, 300)
    steps = [step for each in problems for step in dispatch.plan(each, answer.device, sizes, 1).steps]

    def look() -> None:
        for step in steps:
            assert_in_registers(step, answer.device, tmp_path / "kernel.cubin")

    prove(proven, look, *((*step.compiled, answer.device) for step in steps))


@pytest.mark.parametrize("tree", OWN)
@pytest.mark.parametrize("cache", [KvCache(16, latent=True), KvCache(None, True, True, True)], ids=str)
@pytest.mark.parametrize("heads", [1, 64])
def test_nothing_spills_in_a_kernel_of_its_own(heads, cache, tree, tmp_path, proven):
    """With everything that a call of it may ask for at once, whole or in parts of keys."""
    own, answer = OWN[tree], answer_for(replace(EXTREMES["heavy"], dims=MLA), tree)
    plain, sizes = replace(answer.problem, dropout=False, cache=cache), Sizes(2, heads, 1, 300 // heads, 300)
    problems = (replace(plain, split_kv=split) for split in (False, True))
    steps = [Step(own, each, own.config(each, answer.device, sizes)) for each in problems]
    shared = {"sm90": 16, "sm100": 32}[tree]  # of 64, by as few tiles as there can be
    assert all(step.config.heads == (1 if heads == 1 else shared) for step in steps)

    def look() -> None:
        for step in steps:
            assert_in_registers(step, answer.device, tmp_path / "kernel.cubin")

    prove(proven, look, *((*step.compiled, answer.device) for step in steps))
