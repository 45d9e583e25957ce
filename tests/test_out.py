"""`out` must not share memory with an input or with itself; what only lies between an input's rows may."""

from __future__ import annotations

import random

import pytest
import torch

import cute_flash
from cute_flash import ALiBi, BlockMask, Document
from cute_flash.masks import Causal
from cute_flash.overlap import overlap, overlaps_itself
from tests.refused import HALF, dense, no_launch, packed, tensor  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_launch")

STORAGE = torch.zeros(2, 8, 4, 64, dtype=HALF)  # of an out of the right shape
STORAGE.flatten()[:4096].view(torch.int32)[:3] = torch.tensor([0, 4, 10], dtype=torch.int32)


def inside(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A small operand in the first bytes of STORAGE."""
    count = torch.Size(shape).numel()
    return STORAGE.flatten().view(dtype)[:count].view(shape)


BLOCKS = BlockMask.from_blocks(torch.ones(1, 1, dtype=torch.bool), seqlens=(8, 16), mask=Causal())

# name -> (arguments beside out=STORAGE, what is said of them)
DENSE = {
    "q": ({"q": STORAGE}, "q"),
    "part_of_k": ({"k": STORAGE.view(2, 16, 2, 64)}, "k"),
    "v": ({"v": STORAGE[:, :, :2].as_strided((2, 16, 2, 64), (1024, 64, 0, 1))}, "v"),
    "alibi": ({"alibi_slopes": inside(torch.float32, 4)}, "a rule's tensor"),
    "table": ({"mask": Causal() & Document(inside(torch.int32, 2, 16))}, "a rule's tensor"),
    "table_of_a_score": ({"score": ALiBi(inside(torch.float32, 2, 4))}, "a rule's tensor"),
    "sink": ({"learnable_sink": inside(torch.float32, 4)}, "learnable_sink"),
    "blocks": (
        {"block_mask": BlockMask(inside(torch.int32, 1, 1, 1, 2), BLOCKS.indices, (128, 128), (8, 16))},
        r"block_mask\.counts",
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_out_may_be_no_input(name):
    changed, named = DENSE[name]
    with pytest.raises(ValueError, match=f"out overlaps {named} in memory; allowed: memory that no input"):
        dense(out=STORAGE, **changed)


def test_out_may_be_no_input_of_a_packed_call():
    out = STORAGE.view(-1)[: 10 * 4 * 64].view(10, 4, 64)
    for name, given in (("cu_seqlens_q", inside(torch.int32, 3)), ("seqused_q", inside(torch.int32, 2))):
        with pytest.raises(ValueError, match=f"out overlaps {name} in memory"):
            packed(out=out, **{name: given})


@pytest.mark.parametrize(
    "strides",
    [(0, 256, 64, 1), (2048, 0, 64, 1), (2048, 256, 0, 1), (2048, 128, 64, 1), (8, 256, 64, 1)],
)
def test_out_may_have_no_two_elements_in_one_place(strides):
    out = torch.zeros(9999, dtype=HALF).as_strided((2, 8, 4, 64), strides)
    with pytest.raises(ValueError, match=r"out has shape \(2, 8, 4, 64\) .*: several elements in one place"):
        dense(out=out)


def test_rows_that_only_lie_between_those_of_an_input_are_allowed():
    together = torch.zeros(2, 8, 2, 4, 64, dtype=HALF)
    q, out = together[:, :, 0], together[:, :, 1]
    with pytest.raises(AssertionError, match="launched"):
        dense(q=q, out=out)
    with pytest.raises(ValueError, match="out overlaps q"):
        dense(q=q, out=together.flatten(2, 3)[:, :, 1:5])


def test_the_wrong_call_is_the_one_that_writes(no_launch):  # noqa: F811
    """Inputs may overlap each other."""
    with pytest.raises(AssertionError, match="launched"):
        dense(k=STORAGE.view(2, 16, 2, 64), v=STORAGE.view(2, 16, 2, 64), out=tensor(2, 8, 4, 64))


def strided(choose: random.Random, storage: torch.Tensor) -> torch.Tensor:
    """A tensor of random sizes and strides inside `storage`."""
    while True:
        shape = [choose.choice((0, 1, 1, 2, 2, 3, 3, 4, 5, 5)) for _ in range(3)]
        strides = [choose.choice((0, 1, 2, 3, 4, 6, 12, 24, 30)) for _ in range(3)]
        start = choose.randint(0, 60)
        if start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n) < storage.numel():
            return storage.as_strided(shape, strides, start)


def places(tensor: torch.Tensor) -> list[int]:
    """The address of every byte of every element."""
    size, found = tensor.element_size(), torch.tensor(tensor.data_ptr())
    for count, stride in (*zip(tensor.shape, tensor.stride(), strict=True), (size, 1 / size)):
        found = found[..., None] + (torch.arange(count) * stride * size).long()
    return found.flatten().tolist()


def test_overlaps_are_those_that_counting_bytes_finds():
    choose, storage = random.Random(0), torch.zeros(400, dtype=HALF)
    found = set()
    for _ in range(1500):
        a, b = strided(choose, storage), strided(choose, storage.view(choose.choice((HALF, torch.int32))))
        expected = bool(set(places(a)) & set(places(b))), len(set(places(a))) < len(places(a))
        assert (overlap(a, b), overlaps_itself(a)) == expected, (a.shape, a.stride(), b.shape, b.stride())
        found.add(expected)
    assert len(found) == 4


def test_strides_that_take_too_long_are_taken_for_an_overlap(monkeypatch):
    together = torch.zeros(2, 8, 2, 4, 64, dtype=HALF)
    a, b = together[:, :, 0], together[:, :, 1]
    assert not cute_flash.overlap.overlap(a, b)
    monkeypatch.setattr(cute_flash.overlap, "MOST_STEPS", 1)
    assert cute_flash.overlap.overlap(a, b)
