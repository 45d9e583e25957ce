"""wgmma: when products happen, the mistakes that must be seen, and forms without a model."""

from __future__ import annotations

import numpy as np
import pytest

from cute_flash.emulator import (
    DataRace,
    Deadlock,
    OutOfBounds,
    Program,
    RegisterInFlight,
    UninitializedRead,
    UnmodelledInstruction,
    WarpgroupError,
)

from .evaluate import module
from .wgmma import COMMIT, FENCE, HEAD, MODES, PARAMS, WAIT, Case, registers_of, store


def spoil_tile(base: int) -> str:
    """PTX with which a warpgroup makes 8 KB of shared memory zero."""
    stores = [f"st.shared.v4.b32 [%s1+{2048 * k}], {{0, 0, 0, 0}};\n" for k in range(4)]
    return f"and.b32 %s1, %t, 127;\nmad.lo.u32 %s1, %s1, 16, {base};\n" + "".join(stores)


def test_late_products_read_late():
    """What is stored over A after the issue is what a late product multiplies; an eager one is done."""
    case = Case(16, ("f16", "f16"), steps=1)
    base = int(case.words[0][0]) << 4 & 0x3FFFF
    spoil = f"mad.lo.u32 %s1, %t, 16, {base};\nst.shared.v4.b32 [%s1], {{0, 0, 0, 0}};\n"
    spoil += "st.shared.v4.b32 [%s1+2048], {0, 0, 0, 0};\n" * 3
    spoil += "".join(f"st.shared.v4.b32 [%s1+{2048 * k}], {{0, 0, 0, 0}};\n" for k in range(4))
    middle = f"{FENCE}{case.product(0, '%no')}{COMMIT}{spoil}bar.sync 0;\n{WAIT}"
    code = case.code(middle)
    case.check(case.run(code))
    assert not case.run(code, asynchrony="late").any()
    with pytest.raises(DataRace, match="product reads|read of"):
        case.run(code, races=True)


@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_a_wait_of_one_warpgroup_leaves_the_other_ones_products(schedule):
    """Both issue together; the first one waits, then A is made zero, then the second one waits."""
    case = Case(16, ("f16", "f16"), steps=1)
    base = int(case.words[0][0]) << 4 & 0x3FFFF
    middle = f"""
        {FENCE}{case.product(0, "%no")}{COMMIT}
        setp.ge.u32 %p1, %t, 128;
        @%p1 bra SECOND;
        {WAIT}
        {spoil_tile(base)}
        bar.sync 1, 256;
        bra BOTH;
        SECOND:
        bar.sync 1, 256;
        {WAIT}
        BOTH:
    """
    out = case.run(case.code(middle), block=256, asynchrony="late", schedule=schedule)
    case.check(out[:128])
    assert not out[128:].any()
    case.check(case.run(case.code(middle), block=256))


def test_groups_complete_in_order():
    """Two accumulators in two groups; waiting for the first leaves the second one's poison."""
    case = Case(16, ("f16", "f16"), steps=1)
    copies = "".join(f"mov.b32 %f{100 + k}, %f{k};\n" for k in range(8))
    products = f"{FENCE}{case.product(0, '%no')}{COMMIT}{case.product(0, '%no', 20)}{COMMIT}"
    middle = f"{products}wgmma.wait_group.sync.aligned 1;\n{copies}{WAIT}"
    case.check(case.run(case.code(middle), asynchrony="late"))
    for mode in ("eager", "late"):
        wrong = middle.replace(copies, copies.replace("%f0;", "%f20;"))
        with pytest.raises(RegisterInFlight, match="not been waited for"):
            case.run(case.code(wrong), asynchrony=mode)


def test_a_group_waits_for_what_is_added_to_later():
    """One accumulator, a group per product, and a wait for the first only: the sum is whole at the end."""
    case = Case(16, ("f16", "f16"), steps=3)
    products = "".join(case.product(k, "%yes" if k else "%no") + COMMIT for k in range(3))
    middle = f"{FENCE}{products}wgmma.wait_group.sync.aligned 2;\nwgmma.wait_group.sync.aligned 1;\n{WAIT}"
    for options in MODES:
        case.check(case.run(case.code(middle), **options))


# Mistakes. Each is tried eager and late, and must be seen in both.


@pytest.mark.parametrize("mode", ["eager", "late", "random"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ((WAIT, ""), "touches a register of the product"),
        ((WAIT, "wgmma.wait_group.sync.aligned 1;\n"), "touches a register of the product"),
        ((COMMIT, ""), "touches a register of the product"),
        ((WAIT, f"mov.b32 %f3, 0;\n{WAIT}"), "touches a register of the product"),
        ((WAIT, f"add.f32 %f3, %f3, %f3;\n{WAIT}"), "touches a register of the product"),
        ((FENCE, ""), "something else used without a wgmma.fence since"),
        ((FENCE, f"mov.b32 %f3, 0;\n{FENCE}add.f32 %f9, %f3, %f3;\n"), "uses %f3, which something else used"),
        ((FENCE, f"{FENCE}mov.b32 %f3, 0;\n"), "uses %f3, which something else used without"),
    ],
)
def test_accumulator_mistakes(change, what, mode):
    case = Case(16, ("f16", "f16"))
    code = case.code()
    assert change[0] in code
    with pytest.raises(RegisterInFlight, match=what):
        case.run(code.replace(*change), asynchrony=mode)


@pytest.mark.parametrize("mode", ["eager", "late"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ((WAIT, f"mov.b32 %a1, 0;\n{WAIT}"), "touches a register of the product"),
        ((WAIT, f"mov.b32 %r1, %a1;\n{WAIT}"), "touches a register of the product"),
        ((FENCE, f"{FENCE}add.u32 %a1, %a1, 0;\n"), "uses %a1, which something else used without"),
    ],
)
def test_mistakes_with_a_in_registers(change, what, mode):
    case = Case(16, ("f16", "f16"), in_registers=True)
    with pytest.raises(RegisterInFlight, match=what):
        case.run(case.code().replace(*change), asynchrony=mode)


def test_other_accumulators_that_overlap():
    case = Case(16, ("f16", "f16"))
    code = case.code().replace(case.product(1, "%yes"), case.product(1, "%yes", 4))
    with pytest.raises(RegisterInFlight, match="touches a register"):
        case.run(code)


def test_an_accumulator_as_the_next_a():
    case = Case(16, ("f16", "f16"), in_registers=True)
    code = case.code().replace(case.product(1, "%yes"), case.product(1, "%yes", 20).replace("%a4", "%f0"))
    with pytest.raises(RegisterInFlight, match="touches a register"):
        case.run(code)


def test_copies_between_fence_and_product_are_let_through():
    """A mov passes on what its source is: fenced stays fenced, written stays written."""
    case = Case(16, ("f16", "f16"), in_registers=True)
    copy = "mov.b32 %r3, %a1;\nmov.b32 %a1, %r3;\n"
    case.check(case.run(case.code().replace(FENCE, FENCE + copy)))
    late = copy.replace("mov.b32 %r3, %a1", "xor.b32 %r3, %a1, 0")
    with pytest.raises(RegisterInFlight, match="uses %a1"):
        case.run(case.code().replace(FENCE, FENCE + late))


def test_only_what_happens_is_refused():
    """A touch that a run never reaches is no mistake; where the branch is taken it is one."""
    case = Case(16, ("f16", "f16"))
    touch = "setp.eq.u32 %p1, %t, {};\n@%p1 add.f32 %f3, %f3, %f3;\n"
    case.check(case.run(case.code().replace(WAIT, touch.format(9999) + WAIT)))
    with pytest.raises(RegisterInFlight, match="warp 1"):
        case.run(case.code().replace(WAIT, touch.format(40) + WAIT))
    unfenced = "setp.eq.u32 %p1, %t, {};\n@%p1 mov.b32 %f3, 0;\n"
    case.check(case.run(case.code().replace(FENCE, FENCE + unfenced.format(9999))))
    with pytest.raises(RegisterInFlight, match="warp 1, lane 8"):
        case.run(case.code().replace(FENCE, FENCE + unfenced.format(40)))


def test_a_loop_that_waits_one_group_late():
    """The accumulators take turns: a wait for all but one group is enough for the other one."""
    case = Case(16, ("f16", "f16"), steps=1)
    one, two = case.product(0, "%no"), case.product(0, "%no", 20)
    add = "".join(f"add.f32 %f{40 + k}, %f{40 + k}, %f{{}};\n".replace("{}", f"{{{k}}}") for k in range(8))
    names = lambda first: add.format(*(first + k for k in range(8)))  # noqa: E731
    zero = "".join(f"mov.b32 %f{40 + k}, 0;\n" for k in range(8))
    keep_one = "wgmma.wait_group.sync.aligned 1;\n"
    middle = f"""
        mov.u32 %r0, 0;
        {zero}{FENCE}{one}{COMMIT}
        AGAIN:
        {FENCE}{two}{COMMIT}{keep_one}{names(0)}
        {FENCE}{one}{COMMIT}{keep_one}{names(20)}
        add.u32 %r0, %r0, 1;
        setp.lt.u32 %p1, %r0, 2;
        @%p1 bra AGAIN;
        {WAIT}
    """
    code = case.code(middle)
    exact, _ = case.exact()
    last = store(8).replace("%f", "%f4")
    for options in MODES:
        out = case.run(code.replace(store(8), last), **options).view(np.float32)
        assert np.allclose(out, 4 * registers_of(exact), atol=1e-3)
    with pytest.raises(RegisterInFlight):
        case.run(code.replace(names(0), names(20)))


def test_warpgroups_act_together():
    case = Case(16, ("f16", "f16"), steps=1)
    other = "setp.eq.u32 %p1, %w, 2;\n@%p1 add.s64 %db0, %db0, 64;\n"
    for schedule in ("lockstep", "random"):
        with pytest.raises(WarpgroupError, match="other descriptors or another scale"):
            case.run(case.code().replace(FENCE, other + FENCE), schedule=schedule)
    lane = "setp.eq.u32 %p1, %t, 40;\n@%p1 add.s64 %db0, %db0, 64;\n"
    with pytest.raises(WarpgroupError, match="lanes of one warp give different descriptors.*warp 1"):
        case.run(case.code().replace(FENCE, lane + FENCE))
    scale = "setp.lt.u32 %p1, %t, 64;\n"
    with pytest.raises(WarpgroupError, match="another scale"):
        case.run(case.code().replace(FENCE, scale + FENCE).replace("%no", "%p1"))


def test_part_of_a_warpgroup():
    case = Case(16, ("f16", "f16"), steps=1)
    leave = "setp.eq.u32 %p1, %w, 3;\n@%p1 bra DONE;\n"
    products = f"{FENCE}{case.product(0, '%no')}{COMMIT}"
    middle = f"{leave}{products}{WAIT}DONE:\n"
    with pytest.raises(Deadlock, match="the other warps of the warpgroup to commit"):
        case.run(case.code(middle).replace(store(8), ""))
    with pytest.raises(WarpgroupError, match="1 of 4 warps of warpgroup 0 .* exit without issuing"):
        case.run(case.code(middle.replace(WAIT, "")).replace(store(8), ""))
    elsewhere = leave.replace("DONE", "OTHER")
    elsewhere += f"{products}{WAIT}bra DONE;\nOTHER:{products}{WAIT}DONE:\n"
    with pytest.raises(WarpgroupError, match="issues the product of PTX line"):
        case.run(case.code(elsewhere).replace(store(8), ""))
    for block in (160, 224):
        with pytest.raises(WarpgroupError, match=f"{block // 32} warps leave this one without"):
            case.run(block=block)


def test_operands_must_be_there():
    case = Case(16, ("f16", "f16"), steps=1)
    word = case.words[1][0]
    for wrong, error, what in (
        (word + 128, UninitializedRead, "of an operand was never written"),
        (word | 0x3FC0, OutOfBounds, "an operand's bytes at shared"),
        (word + 8, UninitializedRead, "of an operand was never written"),
        (word | 1 << 49, UnmodelledInstruction, "base offset 1 is not modelled"),
    ):
        with pytest.raises(error, match=f"{what}.*warp 0.*\n.*PTX line|{what}.*\n.*PTX line"):
            case.run(case.code().replace(f"mov.b64 %db0, {word};", f"mov.b64 %db0, {wrong};"))


def test_stores_need_a_proxy_fence_before_products():
    case = Case(16, ("f16", "f16"), steps=1)
    code = case.code()
    case.check(case.run(code, races=True))
    with pytest.raises(DataRace):
        case.run(code.replace("fence.proxy.async.shared::cta;", ""), races=True)
    with pytest.raises(DataRace):
        case.run(code.replace("bar.sync 0;", ""), races=True)


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("m64n16k16", "m64n12k16", "m64n8k16"),
        ("m64n16k16", "m64n16k32", "m64n16k32.f32.f16.f16"),
        ("f32.f16.f16", "f32.f16.bf16", "f32.f16.bf16"),
        ("f32.f16.f16", "f32.e4m3.f16", "f32.e4m3.f16"),
        ("f32.f16.f16", "s32.s8.s8", ".s32"),
        (", 1, 1, 0, 0;", ", 2, 1, 0, 0;", "scale-a, scale-b"),
        (", 1, 1, 0, 0;", ", 1, 1, 0, 2;", "trans-a, trans-b"),
        (", 1, 1, 0, 0;", ", 1, 1;", "trans-a, trans-b"),
        ("%f7}", "%f7, %f8}", "9 accumulator registers"),
        ("%f7}", "%f6}", "names a register twice"),
    ],
)
def test_forms_without_a_model(before, after, what):
    code = Case(16, ("f16", "f16"), steps=1).code()
    assert before in code
    with pytest.raises(UnmodelledInstruction, match=what):
        Program(module(HEAD + code.replace(before, after), PARAMS, "sm_90a"))
