"""A row's bits are the same alone and among many: no size of a call changes how its numbers come about."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cute_flash
from cute_flash import dispatch
from cute_flash.arch.problem import Device, Problem, Sizes
from tests.harness import answer_for, where
from tests.test_sm100_compile import ASKED

# What a tree's config says about a row's numbers; all else is how many rows there are, and when they come.
TELLING = ("tile_n", "polynomial", "reducing_loads")
DEVICES = {
    **dispatch.EMULATED,
    "10.3": replace(dispatch.EMULATED["sm100"], capability=(10, 3)),
    "11.0": Device((11, 0), dispatch.EMULATED["sm100"].shared_memory, 20),
}
DIMS = ((64, 64), (96, 96), (64, 256), (128, 128), (192, 128), (256, 128), (192, 192), (256, 256))
LENGTHS = (1, 8, 20, 64, 65, 100, 128, 129, 200, 256, 257, 300, 384, 385, 600, 1024)


def told(config) -> tuple:
    """What the config says about a row's numbers."""
    return tuple(getattr(config, name, None) for name in TELLING)


def problems() -> dict[str, Problem]:
    """The most and the least that is asked, of every row of the tables, whole and in parts."""
    found = {}
    for asked in ASKED:
        for dims in DIMS:
            problem = answer_for(replace(ASKED[asked], dims=dims), "sm100").problem
            for gqa, split in ((False, False), (True, False), (True, True)):
                parts = {"split_kv": split, "sink": problem.sink and not split}
                found[f"{asked}-{dims[0]}-{dims[1]}-{gqa}-{split}"] = replace(problem, gqa=gqa, **parts)
    return found


PROBLEMS = problems()


@pytest.mark.parametrize("device", DEVICES)
def test_no_size_changes_how_a_row_is_computed(device):
    place = DEVICES[device]
    for name, problem in PROBLEMS.items():
        kernel, _ = dispatch.dispatch(problem, place)
        group = 8 if problem.gqa else 1
        sizes = (Sizes(1, group * heads, heads, n, 4096) for heads in (1, 32) for n in LENGTHS)
        configs = {*kernel.configs(problem, place), *(kernel.config(problem, place, size) for size in sizes)}
        assert len({told(config) for config in configs}) == 1, f"{name}: {configs}"


@pytest.mark.parametrize("given, deterministic, splits", [(None, True, 1), (0, True, 1), (3, True, 3)])
def test_deterministic_leaves_keys_whole(given, deterministic, splits, monkeypatch):
    """Of a query with many keys, which would be split to fill the GPU."""
    wanted = []
    monkeypatch.setattr("cute_flash.ops.forward", lambda call, out: (wanted.append(call.num_splits), None))
    q, k = torch.randn(1, 1, 1, 64).half(), torch.randn(1, 9000, 1, 64).half()
    starts = [torch.tensor([0, x.shape[1]]).int() for x in (q, k)]
    options = {"deterministic": deterministic, "num_splits": given}
    cute_flash.flash_attn_func(q, k, k, **options)
    cute_flash.flash_attn_varlen_func(q[0], k[0], k[0], *starts, 1, 9000, **options)
    assert wanted == [splits, splits]


# Arguments and head dim, each a Problem of other tests.
ALONE = {
    "full": ({}, 64),
    "256": ({}, 256),
}


@pytest.mark.parametrize("name", ALONE)
def test_rows_alone(name, machine):
    """The last queries of one sequence and head by themselves, and among others of a batch."""
    options, dim = ALONE[name]
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 2, 160, 2, dim).bfloat16()
    with where(machine):
        whole = cute_flash.flash_attn_func(q, k, v, deterministic=True, return_lse=True, **options)
        part = [x[-1:, :, -1:] for x in (q[:, -20:], k, v)]
        alone = cute_flash.flash_attn_func(*part, deterministic=True, return_lse=True, **options)
    assert torch.equal(whole[0][-1:, -20:, -1:], alone[0])
    assert torch.equal(whole[1][-1:, -1:, -20:], alone[1])
