"""Which kernel serves what: matching, refusals with every reason, emulated devices, the feature table."""

from __future__ import annotations

import itertools
import re
import threading
from dataclasses import dataclass, replace

import pytest
import torch

import cute_flash
from cute_flash import arch, dispatch, repeat
from cute_flash.arch.backward import BackwardProblem
from cute_flash.arch.combine import COMBINE, CombineProblem
from cute_flash.arch.kernel import Kernel, Step, Steps, Tuning
from cute_flash.arch.problem import FEATURES, Device, Problem, Sizes, Support
from cute_flash.arch.sm90 import BACKWARD
from cute_flash.arch.sm90.backward.tuning import TABLE
from cute_flash.arch.tuning import GradientTable
from cute_flash.masks import Causal, Document
from cute_flash.scores import Softcap

A100 = dispatch.EMULATED["sm80"]
PLAIN = Problem("float16", 64, 64, lse=False)


@dataclass(frozen=True)
class FakeConfig:
    memory: int = 0


def fake_kernel(name: str, **declared):
    """A kernel that only declares. It splits keys in as many parts as the call has sequences, if it does."""
    defaults = {
        "capabilities": ((8, 0), (8, 9)),
        "dtypes": ("float16",),
        "head_dims": (64,),
        "features": frozenset(("dense",)),
    }

    tuning = Tuning(
        config=lambda problem, device, sizes: FakeConfig(sizes.seqlen_q if sizes else device.shared_memory),
        splits=lambda problem, device, sizes: sizes.batch,
    )
    return Kernel(name, "forward", Support(**(defaults | declared)), tuning, launches="")


@pytest.fixture
def kernels(monkeypatch):
    """A function that makes these kernels, and no others, the ones that any device has."""

    def install(*forward):
        others = {"combine": (COMBINE,)}
        monkeypatch.setattr(arch, "load", lambda device, operation: others.get(operation, forward))
        repeat.forget()

    yield install
    repeat.forget()


def test_the_first_kernel_that_serves_is_chosen(kernels):
    late, narrow = fake_kernel("late"), fake_kernel("narrow", head_dims=(128,))
    kernels(narrow, late, fake_kernel("later"))
    kernel, config = dispatch.dispatch(PLAIN, A100)
    assert kernel is late
    assert config == FakeConfig(A100.shared_memory)


def test_a_refusal_lists_every_kernel_and_every_reason(kernels):
    kernels(
        fake_kernel("one", dtypes=("bfloat16",), head_dims=(128, 256)),
        fake_kernel("two", capabilities=((9, 0), (9, 0))),
    )
    with pytest.raises(NotImplementedError) as raised:
        dispatch.dispatch(Problem("float16", 64, 64, mask=None, sink=True, lse=True), A100)
    text = str(raised.value)
    for line in (
        "one: dtype float16 is not one of bfloat16; head_dim 64 is not in 128, 256; "
        "head_dim_v 64 is not in 128, 256; no learnable sinks; no log-sum-exp out",
        "two: needs compute capability 9.0 to 9.0, the device has 8.0; no learnable sinks; "
        "no log-sum-exp out",
    ):
        assert f"  {line}" in text
    assert "float16 with head_dim 64" in text and "sm_80" in text and "166912" in text


def sizes(batch: int = 1, seqlen_q: int = 8) -> Sizes:
    return Sizes(batch, 4, 4, seqlen_q, 100)


def splitting(name: str, **declared):
    """A kernel that can split keys."""
    return fake_kernel(name, features=frozenset(("dense", "sink", "lse", "split_kv")), **declared)


def test_one_launch_where_nothing_is_split(kernels):
    whole = fake_kernel("whole")
    kernels(whole)
    for num_splits in (0, 1):
        plan = dispatch.plan(PLAIN, A100, sizes(batch=7), num_splits)
        assert plan == Steps((Step(whole, PLAIN, FakeConfig(8)),))


def test_the_config_may_depend_on_sizes(kernels):
    kernels(fake_kernel("whole"))
    assert dispatch.plan(PLAIN, A100, sizes(seqlen_q=77), 0).steps[0].config == FakeConfig(77)


@pytest.mark.parametrize("num_splits, expected", [(0, 3), (1, 1), (5, 5)])
def test_splits_are_chosen_or_given(kernels, num_splits, expected):
    kernels(splitting("parts"))
    plan = dispatch.plan(PLAIN, A100, sizes(batch=3), num_splits)
    assert plan.sizes == ({"splits": expected} if expected > 1 else {})
    assert [step.kernel.name for step in plan.steps] == ["parts", "common.combine"][: 1 + (expected > 1)]


def test_what_joins_once_is_left_to_the_combine_kernel(kernels):
    """Parts are told nothing of the sink and always write their log-sum-exp."""
    kernels(splitting("parts"))
    plan = dispatch.plan(replace(PLAIN, sink=True), A100, sizes(), 2)
    part, merging = plan.steps
    assert part.problem == replace(PLAIN, split_kv=True, lse=True)
    assert merging.kernel is COMBINE
    assert merging.problem == CombineProblem("float16", 64, sink=True, lse=False)


def test_a_split_is_refused_with_its_reason(kernels):
    kernels(fake_kernel("whole", features=frozenset(("dense", "lse"))))
    with pytest.raises(NotImplementedError, match=r"whole: no split-KV \(`num_splits`\)"):
        dispatch.plan(PLAIN, A100, sizes(), 2)


def test_another_kernel_may_serve_the_split(kernels):
    kernels(fake_kernel("whole"), splitting("parts"))
    assert len(dispatch.plan(PLAIN, A100, sizes(batch=9), 0).steps) == 1
    assert dispatch.plan(PLAIN, A100, sizes(), 2).steps[0].kernel.name == "parts"


def test_a_device_without_a_tree_is_refused():
    with pytest.raises(NotImplementedError, match=r"compute capabilities \[8, 9, 10, 11, 12\] only"):
        dispatch.dispatch(PLAIN, Device((7, 5), 65536))


@pytest.mark.parametrize(
    "capability, tree",
    [((8, 0), "sm80"), ((8, 6), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm100"),
     ((10, 3), "sm100"), ((12, 0), "sm80"), ((12, 1), "sm80"), ((7, 5), None), ((13, 0), None)],
)
def test_capability_to_tree(capability, tree):
    assert arch.tree_of(capability) == tree


@pytest.mark.parametrize(
    "capability, target",
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((12, 0), "sm_120a")],
)
def test_target_of_a_device(capability, target):
    assert Device(capability, 0).target == target


@pytest.mark.parametrize("name", dispatch.EMULATED)
def test_every_emulated_device_serves_plain_attention(name):
    assert cute_flash.supports("float16", 64, device=name)


def test_supports_says_which_kernel_or_why_not():
    yes = cute_flash.supports(torch.bfloat16, 192, 128, device="sm80", mask=Causal(), varlen=True)
    assert yes and yes.kernel.name in str(yes) and str(yes.config) in str(yes)
    no = cute_flash.supports("float16", 100, device="sm80")
    assert not no and no.kernel is None
    assert "head_dim 100 is not in" in str(no)
    with pytest.raises(ValueError, match="device is 'sm70'; allowed: sm80, sm86"):
        cute_flash.supports("float16", 64, device="sm70")
    with pytest.raises(TypeError, match="paged"):
        cute_flash.supports("float16", 64, device="sm80", paged=True)


HEAVY = {"mask": Document(torch.zeros(1, 1).int()), "score": Softcap(1.0), "dropout": True, "sink": True}


@pytest.mark.parametrize("name", dispatch.EMULATED)
@pytest.mark.parametrize("rules", [{}, HEAVY], ids=["plain", "heavy"])
def test_blocks_of_128_are_served_everywhere(name, rules):
    """And by the first kernel of the tree that takes block masks: none falls back for want of a tile."""
    kernels = arch.load(dispatch.EMULATED[name])
    kernel = next(k for k in kernels if "block_mask" in k.support.features)
    for dims in itertools.product(range(8, 257, 8), (8, 64, 96, 128, 192, 256)):
        answer = cute_flash.supports("float16", *dims, device=name, block_size=(128, 128), **rules)
        assert answer.kernel is kernel, f"{dims}: {answer}"
        assert 128 % answer.config.tile_m == 128 % answer.config.tile_n == 0


@pytest.mark.parametrize(
    "asked, reason",
    [
        ({"block_size": (96, 128)}, r"block_size \(96, 128\) is a multiple of no tile; .* of \(64, 64"),
        ({"block_size": (128, 128), "varlen": True}, "no block mask for packed sequences or used lengths"),
        ({"block_size": (128, 128), "seqused_k": True}, "no block mask for packed sequences or used lengths"),
    ],
    ids=str,
)
def test_block_masks_that_no_kernel_takes(asked, reason):
    answer = cute_flash.supports("float16", 128, device="sm80", **asked)
    assert not answer
    assert re.search(reason, str(answer)), str(answer)


def test_gradients_tiles_lack_room_or_registers():
    """Which of the two the reason says."""
    problem, small = BackwardProblem(PLAIN), replace(dispatch.EMULATED["sm90"], shared_memory=1000)
    assert BACKWARD.reasons(problem, small) == ("no tile fits 1000 bytes of shared memory",)
    table = GradientTable(rows=TABLE.rows, serves=lambda *asked: False)
    heavy = replace(BACKWARD, tuning=table.tuning)
    (reason,) = heavy.reasons(problem, dispatch.EMULATED["sm90"])
    assert reason == "no tile leaves registers for what mask, score and dropout compute"


def test_supports_takes_several_rules_and_plain_functions():
    answer = cute_flash.supports("float16", 64, device="sm80", mask=[Causal(), lambda q, k: q != k])
    assert "visible = ((k <= q) & (q != k))" in answer.problem.mask.text


def test_supports_without_a_device(monkeypatch):
    monkeypatch.delenv("CUTE_FLASH_EMULATE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no GPU is at hand and none is emulated"):
        cute_flash.supports("float16", 64)
    with cute_flash.emulated("sm86"):
        assert cute_flash.supports("float16", 64).device == dispatch.EMULATED["sm86"]


def test_cpu_tensors_without_an_emulated_device(monkeypatch):
    monkeypatch.delenv("CUTE_FLASH_EMULATE", raising=False)
    q = torch.zeros(1, 8, 1, 64, dtype=torch.float16)
    with pytest.raises(RuntimeError) as raised:
        cute_flash.flash_attn_func(q, q, q)
    for words in ("cpu", "emulated(", "CUTE_FLASH_EMULATE=sm80", "scaled_dot_product_attention"):
        assert words in str(raised.value)


def test_emulated_contexts_nest_and_end(monkeypatch):
    monkeypatch.delenv("CUTE_FLASH_EMULATE", raising=False)
    assert dispatch.emulation() is None
    with cute_flash.emulated("sm80") as outer:
        assert dispatch.emulation() is outer
        with pytest.raises(KeyError), cute_flash.emulated("sm90", races=True) as inner:
            assert dispatch.place_of(torch.device("cpu")).device.capability == (9, 0)
            assert inner.options == {"races": True}
            raise KeyError
        assert dispatch.emulation() is outer
    assert dispatch.emulation() is None


def test_an_emulated_device_belongs_to_its_thread(monkeypatch):
    monkeypatch.delenv("CUTE_FLASH_EMULATE", raising=False)
    seen = []
    with cute_flash.emulated("sm80"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.emulation()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_emulation_by_environment(monkeypatch):
    monkeypatch.setenv("CUTE_FLASH_EMULATE", "sm89")
    assert dispatch.place_of(torch.device("cpu")) == (dispatch.EMULATED["sm89"], "emulator")
    with cute_flash.emulated("sm80"):
        assert dispatch.emulation().name == "sm80"
    monkeypatch.setenv("CUTE_FLASH_EMULATE", "ampere")
    with pytest.raises(ValueError, match="CUTE_FLASH_EMULATE is 'ampere'; allowed: sm80"):
        dispatch.place_of(torch.device("cpu"))


@pytest.mark.parametrize("options, error", [({"speed": 3}, TypeError), ({"asynchrony": "soon"}, ValueError)])
def test_options_of_the_emulator_are_checked_at_once(options, error):
    with pytest.raises(error, match="speed|asynchrony is 'soon'"), cute_flash.emulated("sm80", **options):
        pass


def test_emulating_an_unknown_device():
    with pytest.raises(ValueError, match="emulated is 'sm70'"), cute_flash.emulated("sm70"):
        pass


def test_a_cuda_device_is_known_by_its_properties(monkeypatch):
    class Properties:
        major, minor, shared_memory_per_block_optin, multi_processor_count = 8, 6, 101376, 82

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    dispatch._cuda_device.cache_clear()
    assert dispatch.place_of(torch.device("cuda", 3)) == (Device((8, 6), 101376, 82), "cuda")
    dispatch._cuda_device.cache_clear()


def table(text: str) -> dict[str, list[str]]:
    """Rows of a Markdown table by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_feature_table_is_what_kernels_declare(kernels):
    kernels(
        fake_kernel("one", features=frozenset(("dense", "sink"))),
        fake_kernel("two", capabilities=((9, 0), (10, 9)), dtypes=("float16", "bfloat16"),
                    head_dims=range(8, 65, 8), features=frozenset(("varlen",))),
    )
    rows = table(cute_flash.features())
    assert rows[""] == ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120"]
    assert rows[FEATURES["sink"]] == ["✓", "✓", "✓", "–", "–", "–"]
    assert rows[FEATURES["varlen"]] == ["–", "–", "–", "✓", "✓", "–"]
    assert rows["dtypes"] == [*["float16"] * 3, *["float16, bfloat16"] * 2, "–"]
    assert rows["head dims"] == [*["64"] * 3, *["8…64 by 8"] * 2, "–"]
    operations = {"KV cache append and rotary", "attention to an FP8 KV cache", "backward", "FP8"}
    operations.add("FP8 backward")
    assert set(rows) == {"", "---", "dtypes", "head dims", *FEATURES.values(), *operations}


def test_the_shipped_table_names_every_feature():
    rows = table(cute_flash.features())
    assert all(rows[words] for words in FEATURES.values())
    assert rows[FEATURES["dense"]] == ["✓"] * len(dispatch.EMULATED)


def test_only_one_kernel_serves(kernels):
    kernels(fake_kernel("first"), fake_kernel("second"))
    assert dispatch.dispatch(PLAIN, A100)[0].name == "first"
    with dispatch.only("second"):
        assert dispatch.dispatch(PLAIN, A100)[0].name == "second"
    with dispatch.only("third"), pytest.raises(NotImplementedError, match="second: only third is asked for"):
        dispatch.dispatch(PLAIN, A100)
    assert dispatch.dispatch(PLAIN, A100)[0].name == "first"
