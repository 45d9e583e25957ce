"""Calls on KV caches: wrong ones are refused by name before anything is written; what right ones launch."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cute_flash
from cute_flash import contents, decoding, flash_attn_with_kvcache, launch, precompile, repeat
from cute_flash.appending import Append, new
from cute_flash.arch.append import AppendOperands
from cute_flash.arch.problem import Operands


def halves(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def call(**changed):
    """Two sequences with 3 and 30 keys of 40, to which 2 are appended; rotated."""
    arguments = {
        "q": halves(2, 2, 4, 64), "k_cache": halves(2, 40, 2, 64), "v_cache": halves(2, 40, 2, 64),
        "k": halves(2, 2, 2, 64), "v": halves(2, 2, 2, 64), "rotary_cos": halves(50, 16),
        "rotary_sin": halves(50, 16), "cache_seqlens": ints(3, 30), "causal": True,
    }  # fmt: skip
    return flash_attn_with_kvcache(**arguments | changed)


NOTHING = dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin"))
PAGES = {"k_cache": halves(9, 10, 2, 64), "v_cache": halves(9, 10, 2, 64)}
TABLE = torch.tensor([[5, 1, 0, 0], [2, 3, 4, 8]], dtype=torch.int32)
SHARED = torch.zeros(100000, dtype=torch.float16)
WRONG = {
    "q": ({"q": 3}, TypeError, "q is int; allowed: torch.Tensor"),
    "q_rank": ({"q": halves(2, 4, 64)}, ValueError, r"q has shape .*; allowed: \(batch, seqlen, heads, head"),
    "cache_dtype": ({"k_cache": PAGES["k_cache"].float()}, TypeError, "k_cache has dtype torch.float32"),
    "v_cache_dtype": ({"v_cache": PAGES["v_cache"].bfloat16()}, TypeError, "v_cache has dtype .*, q has"),
    "caches": ({"v_cache": halves(2, 41, 2, 64)}, ValueError, "v_cache has shape .* they must be equal but"),
    "rows": ({"k_cache": halves(3, 40, 2, 64), "v_cache": halves(3, 40, 2, 64)}, ValueError,
             "k_cache has 3 rows and q 2 sequences; allowed without cache_batch_idx: as many"),
    "k_alone": ({"v": None}, ValueError, "k is given without v; allowed: both, or neither"),
    "k_shape": ({"k": halves(2, 2, 1, 64)}, ValueError, r"k has shape .*; allowed: \(2, 2, 2, 64\)"),
    "v_rows": ({"v": halves(2, 3, 2, 64)}, ValueError, r"v has shape .*; allowed: \(2, 2, 2, 64\)"),
    "no_lengths": ({"cache_seqlens": None}, ValueError, "k is given without cache_seqlens"),
    "lengths_type": ({"cache_seqlens": 3.0}, TypeError, "cache_seqlens is float; allowed: an int, or"),
    "lengths_dtype": ({"cache_seqlens": torch.tensor([3, 30])}, TypeError, "cache_seqlens has dtype"),
    "lengths_shape": ({"cache_seqlens": ints(3)}, ValueError, "cache_seqlens has 1 numbers; allowed: 2"),
    "lengths_negative": ({"cache_seqlens": -1}, ValueError, "cache_seqlens is -1; allowed: 0 or more"),
    "lengths_room": ({"cache_seqlens": ints(3, 39)}, ValueError, "cache_seqlens has 39; allowed: 0 to 38"),
    "lengths_int": ({"cache_seqlens": 39}, ValueError, "cache_seqlens is 39; allowed: 0 to 38"),
    "lengths_old": (NOTHING | {"cache_seqlens": ints(3, 41)}, ValueError, "cache_seqlens has 41; allowed: "),
    "batch_idx": ({"cache_batch_idx": ints(0, 2)}, ValueError, "cache_batch_idx has 2; allowed: 0 to 1"),
    "batch_idx_alone": (NOTHING | {"cache_seqlens": None, "cache_batch_idx": ints(-1, 0)}, ValueError,
                        "cache_batch_idx has -1; allowed: 0 to 1"),
    "batch_idx_twice": ({"cache_batch_idx": ints(1, 1), "cache_seqlens": ints(29, 30)}, ValueError,
                        "cache_batch_idx gives several new keys one place in the cache"),
    "leftpad": ({"cache_leftpad": ints(0, 31)}, ValueError, r"cache_leftpad\[1\] is 31; .*to .* 30"),
    "leftpad_alone": (NOTHING | {"cache_seqlens": None, "cache_leftpad": ints(0, 0)}, ValueError,
                      "cache_leftpad is given without cache_seqlens"),
    "table_names": (PAGES | {"block_table": TABLE, "page_table": TABLE}, ValueError, "two names of one arg"),
    "table_dtype": (PAGES | {"block_table": TABLE.long()}, TypeError, "block_table has dtype torch.int64"),
    "table_rows": (PAGES | {"block_table": TABLE[:1]}, ValueError, "block_table has 1 rows; allowed: 2"),
    "table_and_rows": (PAGES | {"block_table": TABLE, "cache_batch_idx": ints(0, 1)}, NotImplementedError,
                       "cache_batch_idx is given beside block_table"),
    "cos_alone": ({"rotary_sin": None}, ValueError, "rotary_cos is given without rotary_sin"),
    "cos_dtype": ({"rotary_cos": halves(50, 16).float()}, TypeError, "rotary_cos has dtype torch.float32"),
    "cos_shapes": ({"rotary_sin": halves(50, 8)}, ValueError, "rotary_sin has shape .*, rotary_cos has"),
    "cos_dim": ({"rotary_cos": halves(50, 12), "rotary_sin": halves(50, 12)}, ValueError,
                "rotary_dim 24; allowed: multiples of 16 up to head_dim 64"),
    "cos_wide": ({"rotary_cos": halves(50, 40), "rotary_sin": halves(50, 40)}, ValueError, "rotary_dim 80"),
    "cos_rows": ({"rotary_cos": halves(39, 16), "rotary_sin": halves(39, 16)}, ValueError,
                 "rotary_cos has 39 rows; allowed: 40 or more"),
    "cos_without_k": (NOTHING | {"rotary_cos": halves(50, 16), "rotary_sin": halves(50, 16)}, ValueError,
                      "rotary_cos is given without k"),
    "rotary_seqlens": ({"rotary_seqlens": ints(0, 49)}, ValueError,
                       r"rotary_seqlens\[1\] is 49, and 1 positions follow; allowed: positions 0 to 49"),
    "rotary_alone": (NOTHING | {"rotary_seqlens": ints(0, 4)}, ValueError, "rotary_seqlens is given witho"),
    "max_seqlen_q": ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q is 2 without cu_seqlens_q"),
    "packed": ({"q": halves(4, 4, 64), "cu_seqlens_q": ints(0, 1, 5), "max_seqlen_q": 4}, ValueError,
               "cu_seqlens_q ends with 5, the tensor has 4 rows"),
    "no_longest": ({"q": halves(4, 4, 64), "cu_seqlens_q": ints(0, 1, 4)}, TypeError, "max_seqlen_q is None"),
    "qv": ({"qv": halves(2, 2, 4, 64)}, NotImplementedError, "k is given beside qv; allowed: None"),
    "heads": ({"q": halves(2, 2, 3, 64)}, ValueError, "q has 3 heads, k has 2: q's must be a multiple"),
    "head_dim": ({"q": halves(2, 2, 4, 72)}, ValueError, "k has head_dim 64, q has 72"),
    "window": ({"window_size": 5}, TypeError, "window_size is 5; allowed: "),
    "window_bounds": ({"window_size": ([], 3), "causal": False}, TypeError, "window_size is .* allowed"),
    "scale": ({"softmax_scale": -1.0}, ValueError, "softmax_scale is -1.0; allowed: "),
    "out": ({"out": halves(2, 3, 4, 64)}, ValueError, r"out has shape .*; allowed: \(2, 2, 4, 64\)"),
    "cache_itself": ({"k_cache": halves(1, 40, 2, 64).expand(2, -1, -1, -1)}, ValueError,
                     "k_cache has shape .* several elements in one place"),
    "cache_overlap": ({"k_cache": SHARED[: 2 * 40 * 128].view(2, 40, 2, 64),
                       "v_cache": SHARED[8 : 8 + 2 * 40 * 128].view(2, 40, 2, 64)}, ValueError,
                      "k_cache overlaps v_cache in memory"),
    "new_overlap": ({"k_cache": SHARED[: 2 * 40 * 128].view(2, 40, 2, 64),
                     "k": SHARED[: 2 * 2 * 128].view(2, 2, 2, 64)}, ValueError, "k_cache overlaps k in mem"),
    "alignment": ({"k_cache": SHARED[1 : 1 + 2 * 40 * 128].view(2, 40, 2, 64)}, ValueError,
                  "k_cache begins at address"),
    "gradient": ({"q": halves(2, 2, 4, 64).requires_grad_()}, NotImplementedError, "q requires a grad"),
}  # fmt: skip


@pytest.fixture
def written(monkeypatch):
    """Every launch is a failure, of whichever half."""

    def refuse(*_):
        raise AssertionError("launched")

    monkeypatch.setattr(launch, "executable", lambda *_: refuse)
    with cute_flash.emulated("sm80"):
        yield


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name, written):
    changed, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        call(**changed)


def test_autocast_must_mean_the_cache(written):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="k_cache has .*autocast"):
        call()


@pytest.fixture
def noted(monkeypatch):
    """Operands of every launch; of appending only lengths and a mark in the cache are written."""
    seen = []

    def executable(kernel, *_):
        def run(*operands):
            kind = AppendOperands if kernel.operation == "append" else Operands
            seen.append(kind(*operands) if kernel.operation != "combine" else operands)
            if kind is AppendOperands:
                seen[-1].seqlens.copy_(seen[-1].cache_seqlens + seen[-1].k_new.shape[1])
                seen[-1].k_cache[0, 0] = 1.0
                if seen[-1].q_rotated is not None:
                    seen[-1].q_rotated.zero_()

        return run

    monkeypatch.setattr(launch, "executable", executable)
    repeat.forget()
    with cute_flash.emulated("sm80"), torch.no_grad():
        yield seen


def test_what_is_launched(noted):
    call(num_splits=1)
    first, second = noted
    assert second.q is first.q_rotated and second.seqused_k is first.seqlens
    assert second.k is first.k_cache and first.query_step == 1
    assert first.seqlens.tolist() == [5, 32]


def test_again(noted):
    """A call like an earlier one is not decided again; its lengths are its own, as ints too."""
    for lengths in (ints(3, 30), ints(4, 31), 7, 9):
        call(cache_seqlens=lengths, num_splits=1)
    assert len(decoding._DECIDED) == 1
    assert [given.cache_seqlens.tolist() for given in noted[::2]] == [[3, 30], [4, 31], [7, 7], [9, 9]]
    with pytest.raises(ValueError, match="cache_seqlens has 39"):
        call(cache_seqlens=ints(3, 39), num_splits=1)
    with pytest.raises(ValueError, match="k_cache overlaps k in memory"):
        cache = SHARED[: 2 * 40 * 128].view(2, 40, 2, 64)
        call(k_cache=cache, k=SHARED[: 2 * 2 * 128].view(2, 2, 2, 64), num_splits=1)
    assert len(noted) == 8


def test_one_query_needs_no_causal_mask(noted):
    call(q=halves(2, 1, 4, 64), num_splits=1)
    call(q=halves(2, 1, 4, 64), num_splits=1, causal=False, window_size=(5, 0))
    assert noted[1].mask_values is None and noted[3].mask_values == (5, 0)


def test_nothing_to_append(noted):
    """No launch for no keys; the lengths are what they were."""
    call(**NOTHING | {"k": halves(2, 0, 2, 64), "v": halves(2, 0, 2, 64)}, num_splits=1)
    (attention,) = noted
    assert attention.seqused_k.tolist() == [3, 30]


def test_words_of_the_command_line_name_what_is_launched(monkeypatch, noted):
    """So that a bundle may hold it."""
    asked, stub = [], launch.executable
    monkeypatch.setattr(launch, "executable", lambda kernel, *key: asked.append(key[0]) or stub(kernel, *key))
    dense = ["causal", "gqa", "seqused_k", "cache_batch_idx", "rotary_dim=32", "rotary_interleaved"]
    call(cache_batch_idx=ints(1, 0), num_splits=1)
    paged = ["varlen", "gqa", "seqused_k", "page_size=10", "append", "lse"]
    rows = {"q": halves(4, 4, 64), "cu_seqlens_q": ints(0, 1, 4), "max_seqlen_q": 3, "causal": False}
    unrotated = {"rotary_cos": None, "rotary_sin": None, "return_softmax_lse": True}
    call(**PAGES, **rows, **unrotated, block_table=TABLE, num_splits=1)
    for words, appended, attended in zip((dense, paged), asked[::2], asked[1::2], strict=True):
        problem = precompile.problem_of("float16", (64, 64), words)
        assert attended == problem and appended == precompile.append_of(problem, words)


class Watch(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_no_length_is_read(noted, monkeypatch):
    """As on a GPU, where numbers are not looked at: nothing comes to the host."""
    monkeypatch.setattr(contents, "can_be_read", lambda device: False)
    watch = Watch()
    with watch:
        call(num_splits=1)
        call(cache_seqlens=9, num_splits=1)
    assert {"cute_flash.append.default", "cute_flash.forward.default"} <= set(watch.seen)
    assert not [name for name in watch.seen if "_local_scalar_dense" in name or "nonzero" in name]


def test_traced(noted):
    """torch.compile sees what is written: the caches, and nothing else, without a graph break."""

    def step(q, cache, new, lengths):
        out = flash_attn_with_kvcache(q, cache, cache * 1, new, new, cache_seqlens=lengths, num_splits=1)
        return out, cache + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    cache = halves(2, 40, 2, 64)
    _, after = compiled(halves(2, 1, 4, 64), cache, halves(2, 1, 2, 64), ints(3, 30))
    assert cache[0, 0].eq(1).all() and after[0, 0].eq(2).all() and after[1].eq(1).all()
    assert len(noted) == 2


def test_operator(noted):
    """What torch asks of an operator that writes into its arguments."""
    cache, keys = ([halves(2, n, 2, 64) for _ in range(2)] for n in (40, 2))
    append = Append(
        *cache, *keys, ints(3, 30), None, None, halves(2, 2, 4, 64), None, 2, halves(50, 16), halves(50, 16),
        None, True, 1,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.cute_flash.append.default, tuple(append))
    assert new(append).q.shape == (2, 2, 4, 64)


def test_meta(noted):
    tensors = {"q": (2, 2, 4, 64), "k_cache": (2, 40, 2, 64), "v_cache": (2, 40, 2, 32)}
    given = {name: halves(*shape).to("meta") for name, shape in tensors.items()}
    out, lse = flash_attn_with_kvcache(
        **given, k=halves(2, 1, 2, 64).to("meta"), v=halves(2, 1, 2, 32).to("meta"),
        cache_seqlens=ints(0, 0).to("meta"), return_softmax_lse=True,
    )  # fmt: skip
    assert out.shape == (2, 2, 4, 32) and lse.shape == (2, 4, 2) and not noted
