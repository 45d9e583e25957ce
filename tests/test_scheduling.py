"""`get_scheduler_metadata`: one launch for all lengths, by which the device shares out keys and sequences."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch

import cute_flash
from cute_flash import contents, dispatch, flash_attn_with_kvcache, get_scheduler_metadata, launch, repeat
from cute_flash.arch.common.blocks import Phase, Range, part_of
from cute_flash.arch.problem import KvCache, Problem, Sizes
from cute_flash.arch.scheduled import ScheduledOperands, ScheduledProblem
from cute_flash.problems import problem
from tests.accuracy import assert_accurate
from tests.harness import moved, where
from tests.kv_calls import KvCall, KvCase
from tests.kv_reference import appended
from tests.test_bad_cache import Watch, halves, ints
from tests.test_resources import assert_in_registers

ROOM, BOUND = 200, 3
LENGTHS = ((200, 0, 1, 7, 130), (0, 0, 0, 0, 0), (1, 190, 33, 0, 200), (200, 200, 200, 200, 200))
SIZES = (5, 1, ROOM, 8, 2, 128)  # batch, queries, keys, heads, heads of keys, head_dim
CASES = (
    KvCase(
        "pages", (200, 6, 0), new=1, queries=(1, 1, 1), heads=(8, 2), dims=(128, 128), rotary=(64, False),
        page=16, arguments={"causal": True}, scheduled=BOUND,
    ),
    # Keys stay whole: the order alone.
    KvCase(
        "packed", (33, 0, 190, 1, 128), new=1, queries=(3, 40, 0, 1, 5), heads=(2, 2), packed=True, rows=True,
        leftpad=True, arguments={"causal": True}, scheduled=1,
    ),
)  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """(problem, operands of each launch) of every kernel of attention that is asked for."""
    seen, compiled = [], launch.executable

    def executable(kernel, asked, *others):
        run = compiled(kernel, asked, *others)
        if kernel.operation != "forward":
            return run
        seen.append((asked, []))

        def noted(*operands, given=seen[-1][1]):
            run(*operands)
            given.append(operands)

        return noted

    monkeypatch.setattr(launch, "executable", executable)
    repeat.forget()
    yield seen
    repeat.forget()


def test_one_launch_serves_all_lengths(machine, launched, monkeypatch):
    """Right for every length, the same bits as with as many parts of a sequence by itself, nothing more read
    nor written than its parts.
    """
    generator, schedules = torch.Generator().manual_seed(0), []
    for n, lengths in enumerate((*LENGTHS, LENGTHS[2])):
        tensors = call_of(lengths, generator)
        given = {name: moved(x, machine) for name, x in tensors.items()}
        with where(machine):
            schedules.append(get_scheduler_metadata(*SIZES, given["cache_seqlens"], num_splits=BOUND))
            # In the end that of other lengths: they are shared out unevenly, and right.
            metadata = schedules[n if n < len(LENGTHS) else 0]
            out, lse = attend(given, scheduler_metadata=metadata)
        seen = appended(**tensors)
        starts = {"cu_seqlens_q": seen.cu_seqlens_q, "cu_seqlens_k": seen.cu_seqlens_k}
        assert_accurate(out.flatten(0, 1).cpu(), lse[..., 0].mT.cpu(), seen[:3], **starts)
        written = ScheduledOperands(*launched[0][1][-1])
        split = [(b, parts) for b, parts in enumerate(metadata.splits.tolist()) if parts > 1]
        for b, parts in enumerate(metadata.splits.tolist()):
            assert (written.lse[parts:, b] == -math.inf).all() and written.out[parts:, b].isnan().all()
        with where(machine):
            alone = [attend({n: x[b : b + 1] for n, x in given.items()}, num_splits=p) for b, p in split]
        for (b, _), same in zip(split, alone, strict=True):
            assert torch.equal(out[b], same[0][0]) and torch.equal(lse[b], same[1][0])
    assert schedules[0].splits.tolist() != schedules[2].splits.tolist()
    # It is this order that CTAs go by: with one sequence in all places there are no others.
    monkeypatch.setattr(contents, "can_be_read", lambda device: False)
    with where(machine):
        first, _ = attend(given, scheduler_metadata=metadata._replace(order=torch.zeros_like(metadata.order)))
    assert torch.equal(first[0], out[0]) and first[1:].isnan().all()
    assert [len(runs) for asked, runs in launched if asked.scheduled] == [len(LENGTHS) + 2]


def call_of(lengths: tuple[int, ...], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One query for each sequence; NaN where no key is."""
    batch, _, room, heads, heads_kv, dim = SIZES
    found = {"q": torch.randn(batch, 1, heads, dim, generator=generator).bfloat16()}
    for name in ("k_cache", "v_cache"):
        found[name] = torch.randn(batch, room, heads_kv, dim, generator=generator).bfloat16()
        for keys, length in zip(found[name], lengths, strict=True):
            keys[length:] = math.nan
    return found | {"cache_seqlens": ints(*lengths)}


def attend(given: dict[str, torch.Tensor], **options):
    return flash_attn_with_kvcache(**given, return_softmax_lse=True, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beside_other_features(case, machine):
    """In any order of events, races looked for where it is emulated."""
    events = {"asynchrony": "late", "schedule": "random", "seed": 1, "races": True}
    KvCall(case, machine).check(**{} if machine == "cuda" else events)


def test_a_split_beyond_its_sequences_has_no_keys():
    """The others have each block once, whatever phases their blocks come in."""
    ranges = ((0, 0, 0), (0, 1, 1), (2, 5, 9), (0, 7, 7), (3, 3, 8))
    for cuts, parts in itertools.product(ranges, (1, 2, 4, 9)):
        low, middle, high = cuts
        visits = Range([Phase(middle, high, True), Phase(low, middle, False)])
        shares = [part_of(visits, part, parts) for part in range(parts + 3)]
        assert not any(share.any() for share in shares[parts:])
        assert all(phase.visits <= 0 for share in shares[parts:] for phase in share.phases)
        places = [p for share in shares for phase in share.phases for p in range(phase.first, phase.last)]
        assert sorted(places) == list(range(low, high))


@pytest.mark.parametrize("page_size", [None, 16])
def test_lookups_stay_in_registers(page_size, arch, tmp_path):
    """Of the kernels of other tests here, so that they are compiled once."""
    device, cache = dispatch.EMULATED[arch], KvCache(page_size)
    asked = problem(dtype="bfloat16", head_dim=128, seqused_k=True, gqa=True, cache=cache, scheduled=True)
    step = dispatch.plan(asked, device, Sizes(5, 8, 2, 1, ROOM), BOUND).steps[0]
    assert step.problem.scheduled and step.problem.split_kv
    assert_in_registers(step, device, tmp_path / "kernel.cubin")


def metadata(*lengths: int, arch: str = "sm90", **changed) -> cute_flash.SchedulerMetadata:
    """Of bfloat16, 8 heads of 2, on an emulated device."""
    named = ("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim")
    given = dict(zip(named, (len(lengths), 1, 1 << 16, 8, 2, 128), strict=True))
    with cute_flash.emulated(arch):
        return get_scheduler_metadata(**given | {"cache_seqlens": ints(*lengths)} | changed)


def test_a_long_sequence_is_taken_in_more_parts_and_first():
    found = metadata(100, 60000, 100, 30000)
    assert found.order.tolist() == [1, 3, 0, 2]
    short, long, _, half = found.splits.tolist()
    assert short == 1 and long == pytest.approx(2 * half, abs=1) and half > 8
    # Tiles of two KV heads: about as many CTAs as there are multiprocessors.
    assert 0.8 * 132 <= 2 * found.splits.sum() <= 132
    even = metadata(30000, 30000, 30000, 30000).splits
    assert len(set(even.tolist())) == 1 and 0.8 * 132 <= 2 * even.sum() <= 132
    assert metadata(0, 0).splits.tolist() == [1, 1]


def test_an_upper_bound_for_the_grid():
    """A sequence by itself says how many parts there may be; or the user."""
    found = metadata(100, 60000, 100, 30000)
    kernel = dispatch.supports("bfloat16", 128, device="sm90", gqa=True, split_kv=True).kernel
    alone = problem(dtype="bfloat16", head_dim=128, gqa=True, seqused_k=True, cache=KvCache())
    assert found.num_splits == kernel.splits(alone, dispatch.EMULATED["sm90"], Sizes(1, 8, 2, 1, 1 << 16))
    assert found.splits.max() <= found.num_splits
    assert metadata(60000, 60000, num_splits=5).splits.tolist() == [5, 5]


def test_lengths_are_those_after_appending_and_of_keys_in_use():
    whole = metadata(1000, 5000)
    assert torch.equal(metadata(0, 4000, max_seqlen_k_new=1000).splits, whole.splits)
    assert torch.equal(metadata(1300, 5100, cache_leftpad=ints(300, 100)).splits, whole.splits)
    # Queries of one sequence fill many tiles, that of the other one.
    packed = metadata(9000, 9000, max_seqlen_q=2000, cu_seqlens_q=ints(0, 2000, 2001), num_splits=64)
    assert (packed.splits < metadata(9000, 9000, num_splits=64).splits).all()


def test_written_in_place():
    found = metadata(100, 60000)
    again = metadata(60000, 100, out=found)
    assert again is found and found.order.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"out is for .* 2 sequences .*; allowed: for .* 3 sequences"):
        metadata(1, 2, 3, out=found)


WRONG = {
    "batch": ({"batch_size": 3}, ValueError, "cache_seqlens has 2 numbers; allowed: 3"),
    "heads": ({"num_heads_q": 7}, ValueError, "num_heads_q is 7, num_heads_kv 2; allowed: a multiple"),
    "queries": ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q is -1; allowed: 0 or more"),
    "keys": ({"max_seqlen_k": 2.0}, TypeError, "max_seqlen_k is 2.0"),
    "dtype": ({"qkv_dtype": torch.float32}, TypeError, "qkv_dtype is torch.float32; allowed: torch.float16"),
    "two dtypes": ({"qkv_dtype": torch.float8_e5m2, "kv_dtype": torch.float8_e4m3fn}, TypeError,
                   "kv_dtype is torch.float8_e4m3fn; allowed beside torch.float8_e5m2: None, "),
    "block": ({"qkv_dtype": torch.float8_e5m2, "quantization_block": 32}, ValueError,
              "quantization_block is 32; allowed: None, 64, 128"),
    "block of 16 bits": ({"quantization_block": 64}, ValueError,
                         "quantization_block is 64; allowed beside torch.bfloat16: None"),
    "lengths": ({"cache_seqlens": 3}, TypeError, "cache_seqlens is int; allowed: torch.Tensor"),
    "leftpad": ({"cache_leftpad": ints(1)}, ValueError, "cache_leftpad has 1 numbers; allowed: 2"),
    "starts": ({"cu_seqlens_q": ints(0, 1)}, ValueError, "cu_seqlens_q has 2 numbers; allowed: 3"),
    "page": ({"page_size": 0}, ValueError, "page_size is 0; allowed: 1 or more"),
    "splits": ({"num_splits": 129}, ValueError, "num_splits is 129; allowed: 1 to 128"),
    "window": ({"window_size": 3}, TypeError, "window_size is 3; allowed: "),
    "head_dim": ({"headdim": 260}, NotImplementedError, "head_dim 260 is not in 8…576"),
    "out": ({"out": ints(1, 2)}, TypeError, "out is Tensor; allowed: SchedulerMetadata"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    changed, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        metadata(3, 30, **changed)


@pytest.fixture
def stubbed(monkeypatch):
    """Names of kernels that are launched, none of which runs; the device is an A100."""
    seen = []
    monkeypatch.setattr(launch, "executable", lambda kernel, *_: lambda *given: seen.append(kernel.name))
    repeat.forget()
    with cute_flash.emulated("sm80"), torch.no_grad():
        yield seen
    repeat.forget()


def decode(given=None, **changed):
    """Two sequences with 3 and 30 keys of 40."""
    arguments = {"q": halves(2, 1, 4, 64), "k_cache": halves(2, 40, 2, 64), "v_cache": halves(2, 40, 2, 64)}
    arguments |= {"cache_seqlens": ints(3, 30), "scheduler_metadata": given}
    return flash_attn_with_kvcache(**arguments | changed)


def schedule(*, arch: str = "sm80", **changed) -> cute_flash.SchedulerMetadata:
    """What `decode` takes."""
    sizes = {"max_seqlen_k": 40, "num_heads_q": 4, "headdim": 64, "qkv_dtype": torch.float16}
    return metadata(3, 30, arch=arch, **sizes | {"num_splits": 2} | changed)


REFUSED = {
    "type": (ints(1, 1), {}, TypeError, "scheduler_metadata is Tensor; allowed: a SchedulerMetadata"),
    "batch": (schedule(batch_size=3, cache_seqlens=ints(1, 2, 3)), {}, ValueError,
              "scheduler_metadata.splits has 3 numbers; allowed: 2, one per sequence"),
    "kernel": (schedule(arch="sm90"), {}, ValueError,
               r"scheduler_metadata is for sm90.forward .*; allowed: for sm80.forward with"),
    "queries": (schedule(max_seqlen_q=2), {}, ValueError, "up to 2 queries.*; allowed: for .* up to 1 quer"),
    "heads": (schedule(num_heads_q=8), {}, ValueError, "8 heads and 2 .*; allowed: for .* 4 heads and 2"),
    "config": (schedule(headdim=256), {}, ValueError, "tile_n=.*; allowed: for sm80.forward with Config"),
    "pages": (schedule(), {"num_splits": 3}, ValueError,
              "num_splits is 3 beside scheduler_metadata; allowed: None, 0 or its own, 2"),
    "lengths": (schedule(), {"cache_seqlens": None, "k": None, "v": None}, ValueError,
                "scheduler_metadata is given without cache_seqlens; allowed: with it"),
    "invariant": (schedule(), {"batch_invariant": True}, ValueError, "given beside batch_invariant=True"),
    "dtype": (schedule()._replace(order=ints(0, 1).long()), {}, TypeError, "scheduler_metadata.order has"),
    "none": (schedule()._replace(splits=ints(0, 1)), {}, ValueError, "splits has 0; allowed: 1 to 2, its"),
    "many": (schedule()._replace(splits=ints(1, 3)), {}, ValueError, "splits has 3; allowed: 1 to 2"),
    "twice": (schedule()._replace(order=ints(1, 1)), {}, ValueError, r"order has \[1, 1\]; allowed: 0 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, stubbed):
    """The first time, and after one that was right; before anything is appended."""
    given, changed, error, text = REFUSED[name]
    new = {name: halves(2, 1, 2, 64) for name in "kv"}
    for _ in range(2):
        with pytest.raises(error, match=text):
            decode(given, **new | changed)
        assert "common.append" not in stubbed
        decode(schedule())


def test_as_often_as_metadata_is_new(stubbed):
    """A call like an earlier one is not decided again, with other numbers of parts."""
    for splits in ((1, 2), (2, 2), (1, 1)):
        decode(schedule()._replace(splits=ints(*splits)))
        decode(schedule()._replace(splits=ints(*splits)), num_splits=2)
    assert stubbed == ["sm80.forward", "common.combine"] * 6 and len(repeat._DECIDED) == 1


def test_no_length_is_read(stubbed, monkeypatch):
    """As on a GPU, where numbers are not looked at: nothing comes to the host."""
    monkeypatch.setattr(contents, "can_be_read", lambda device: False)
    watch = Watch()
    with watch:
        decode(schedule(cu_seqlens_q=None, cache_leftpad=ints(0, 0)), cache_leftpad=ints(0, 0))
        metadata(1, 2, cu_seqlens_q=ints(0, 1, 2), arch="sm80")
    assert {"cute_flash.forward.default", "aten.sort.stable"} <= set(watch.seen)
    words = ("_local_scalar_dense", "nonzero", "_to_cpu", "is_nonzero", "equal.default")
    assert not [name for name in watch.seen if any(word in name for word in words)]


def test_traced(stubbed):
    """torch.compile takes a call with metadata, without a graph break; making one is refused there."""
    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    assert compiled(schedule()).shape == (2, 1, 4, 64) and stubbed[0] == "sm80.forward"
    with pytest.raises(Exception, match="get_scheduler_metadata is traced by torch.compile"):
        torch.compile(get_scheduler_metadata, fullgraph=True)(2, 1, 40, 4, 2, 64, ints(3, 30))


def test_what_is_compiled():
    """Problems of calls without metadata are as they were; one with it is another, with two operands more."""
    plain = Problem("float16", 64, 64, seqused_k=True, cache=KvCache(), split_kv=True)
    names = [field.name for field in fields(plain)]
    asked = ScheduledProblem(**{name: getattr(plain, name) for name in names})
    assert "schedul" not in repr(plain) and repr(asked).startswith("ScheduledProblem(") and asked != plain
    assert asked.specs()[:-2] == plain.specs() and asked.specs().sequence_splits.dims == ("batch",)
    assert replace(asked, split_kv=False).specs().sequence_splits is None
    assert asked.features() == (*plain.features(), "schedule")
