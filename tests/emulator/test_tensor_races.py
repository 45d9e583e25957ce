"""The race detector on tensor memory: each order that a kernel needs, with it and without it."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator import DataRace, EmulatorError

from . import tensor
from .test_mbarrier import ORDERS
from .test_tcgen05_mma import A_AT, D_AT, PLACES, Case, prepare
from .test_tensor_memory import allocate, give, take

CASE = Case(add=False)
IN_TENSOR_MEMORY = Case(add=False, a_in_tensor_memory=True)
SECOND = "@%second"  # thread 0 of warp 1
SETUP = f"""
    .reg .b32 %u<4>;
    .reg .pred %second, %writer;
    setp.eq.u32 %second, %t, 32;
    setp.eq.u32 %writer, %t, 64;
    shl.b32 %mine, %w, 21;
    add.u32 %mine, %mine, %tm;
    add.u32 %r8, %data, {PLACES[1]};
"""
LOAD = f"tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%u0}}, [%mine+{D_AT + 5}];\ntcgen05.wait::ld.sync.aligned;"
STORE = f"tcgen05.st.sync.aligned.32x32b.x1.b32 [%mine+{D_AT + 5}], {{%t}};"
STORED = "tcgen05.wait::st.sync.aligned;"
KEEP_A = f"""
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%u1}}, [%mine+{A_AT + 2}];
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%mine+{A_AT + 2}], {{%u1}};
"""
MEET = "bar.sync 0;"
TOUCH = "@%writer st.shared.b32 [%r8], %t;"


def parts(case: Case) -> tuple[str, str, str, tuple]:
    """(operands, mma, commit and wait by everybody, data) of a product."""
    code, images, before, after = prepare(case)
    lines = code.splitlines()
    at = next(k for k, line in enumerate(lines) if "tcgen05.mma" in line)
    operands = SETUP + "\n".join(lines[:at])
    return operands, lines[at], "\n".join(lines[at + 1 :]), (images, before, after)


def execute(pieces: list[str], case: Case = CASE, **options) -> np.ndarray:
    """Run pieces of code around a product: MMA stands for it, DONE for its commit and everybody's wait."""
    operands, mma, done, (images, before, _) = parts(case)
    known = {"MMA": mma, "DONE": done, "OTHER": mma.replace("@%issuer", SECOND)}
    known["OTHER_DONE"] = tensor.commit(guard=SECOND)
    code = "\n".join([operands, *(known.get(piece, piece) for piece in pieces)])
    return tensor.run(code, images, before, **options)


# Code with the order, the piece that makes it, and what is said without that piece.
NEEDED = [
    (["MMA", "DONE", LOAD], "DONE", CASE, "loads columns 69 to 69, .* the write of work that warp 0 issued"),
    (["MMA", "DONE", STORE, STORED], "DONE", CASE, "stores to columns 69 to 69, .* work that warp 0 issued"),
    ([LOAD, MEET, "MMA", "DONE"], MEET, CASE, "writes columns 64 to 127, .* the read of warp 1"),
    ([STORE, STORED, MEET, "MMA", "DONE"], STORED, CASE, "no tcgen05.wait::st has waited for, of warp 0"),
    ([STORE, STORED, MEET, "MMA", "DONE"], MEET, CASE, "writes columns 64 to 127, .* the write of warp 1"),
    ([KEEP_A, STORED, MEET, "MMA", "DONE"], STORED, IN_TENSOR_MEMORY, "reads columns 400 .*wait::st"),
    ([KEEP_A, STORED, MEET, "MMA", "DONE"], MEET, IN_TENSOR_MEMORY, "reads columns 400 .* write of warp 1"),
    (["MMA", "DONE", KEEP_A, STORED], "DONE", IN_TENSOR_MEMORY, "stores to columns 402 .* the read of work"),
    (["MMA", MEET, "OTHER", "OTHER_DONE", "", "DONE2"], MEET, CASE, "the write of work that warp 0 issued"),
    (["MMA", "DONE", TOUCH], "DONE", CASE, "writes shared .* the read of tensor"),
    ([TOUCH, "fence.proxy.async.shared::cta;", MEET, "MMA", "DONE"], "fence.proxy.async.shared::cta;", CASE,
     "no fence.proxy.async between"),
]  # fmt: skip
DONE2 = tensor.commit(barrier="%bar+8")


@pytest.mark.parametrize("options", ORDERS, ids=str)
@pytest.mark.parametrize("number", range(len(NEEDED)))
def test_with_the_order(number, options):
    pieces, _, case, _ = NEEDED[number]
    execute([DONE2 if piece == "DONE2" else piece for piece in pieces], case, **options)


@pytest.mark.parametrize("number", range(len(NEEDED)))
def test_without_it(number):
    pieces, order, case, words = NEEDED[number]
    pieces = [DONE2 if piece == "DONE2" else piece for piece in pieces if piece != order]
    with pytest.raises(DataRace, match=words):
        execute(pieces, case)


def test_knowledge_is_passed_on():
    """One warp waits for the commit; the others hear of it at a barrier."""
    operands, mma, done, (images, before, after) = parts(CASE)
    commit, wait = done.strip().split("\n", 1)
    alone = f"@!%second bra meet;\n{wait}\nmeet:\n{MEET}"
    code = "\n".join([operands, mma, commit, alone, LOAD])
    assert np.array_equal(tensor.run(code, images, before), after)


def test_a_commit_speaks_for_its_own_thread_only():
    """Another thread's commit does not tell that the product is over."""
    with pytest.raises(DataRace, match="the write of work that warp 0 issued"):
        execute(["MMA", MEET, "OTHER_DONE", LOAD])
    execute(["MMA", MEET, "OTHER_DONE", DONE2, LOAD])


def test_an_earlier_commit_does_not_cover_a_later_product():
    with pytest.raises(DataRace, match="the write of work that warp 0 issued"):
        execute(["MMA", "DONE", "MMA", LOAD])
    execute(["MMA", "DONE", "MMA", DONE2, LOAD])


def unread(code: str) -> str:
    """A kernel that does not look at tensor memory in the end."""
    text = tensor.kernel(code)
    assert tensor.READ_TENSOR in text
    return text.replace(tensor.READ_TENSOR, "")


def test_columns_that_are_given_back_must_be_idle():
    """The product is still writing when warp 0 deallocates."""
    operands, mma, _, (images, before, _) = parts(CASE)
    text = unread("\n".join([operands, mma]))
    with pytest.raises(DataRace, match="deallocates columns 0 to 511, .* the write of work"):
        tensor.execute(text, images, before)


def test_two_warps_of_one_quarter():
    """Warps 0 and 4 reach the same lanes."""
    warps = "setp.eq.u32 %p0, %w, {};\n@!%p0 bra skip{};\n{}\nskip{}:"
    code = warps.format(0, 0, take(0, 32), 0) + f"\n{MEET}\nld.shared.b32 %r0, [%a];\n"
    code += "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r0], {%t};\ntcgen05.wait::st.sync.aligned;\n"
    code += f"{MEET}\n" + warps.format(0, 1, give(0, 32), 1)
    allocate(code, block=128, races=True)
    with pytest.raises(DataRace, match="stores to columns 0 to 0, lanes 0 to 31 .* warp [04]"):
        allocate(code, block=160, races=True)


def test_work_must_be_over_before_its_columns_and_its_cta_are_gone():
    """Without the detector, too: a late product finds its columns given back."""
    operands, mma, done, (images, before, _) = parts(CASE)
    late = {"races": False, "asynchrony": "late"}
    tensor.execute(unread("\n".join([operands, mma, done])), images, before, **late)
    with pytest.raises(EmulatorError, match="exits while tensor work of its is under way"):
        tensor.execute(unread("\n".join([operands, mma])), images, before, **late)


def test_a_last_commit_may_arrive_when_nobody_waits():
    operands, mma, done, (images, before, after) = parts(CASE)
    commit = done.strip().split("\n", 1)[0].replace("[%bar]", "[%bar+8]")
    code = "\n".join([operands, mma, done, commit])
    assert np.array_equal(tensor.run(code, images, before, asynchrony="late"), after)
