"""What the parser reads, what it refuses, and what translation refuses."""

from __future__ import annotations

import gc

import pytest

from cute_flash.emulator import EmulatorError, ParseError, Program, UnmodelledInstruction
from cute_flash.emulator.ptx.operands import (
    Address,
    Immediate,
    Not,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from cute_flash.emulator.ptx.parse import parse

from .evaluate import module

REGISTERS = ".reg .b32 %r<9>;\n.reg .b64 %d<9>;\n.reg .pred %p<9>;\n"


def operands(line: str) -> tuple:
    instructions = parse(module(REGISTERS + line)).entries["k"].instructions
    return instructions[0].operands


def names(values: tuple) -> list:
    return [v.name if isinstance(v, Register) else v for v in values]


def test_operand_forms():
    assert names(operands("op %r1, -5, 0x1F, 0b11, 7U;")) == ["%r1", *map(Immediate, (-5, 31, 3, 7))]
    assert operands("op 0f3F800000, 0d3FF0000000000000, -0f3F800000, 1.5;") == (
        Immediate(0x3F800000, 32), Immediate(0x3FF0000000000000, 64), Immediate(0xBF800000, 32),
        Immediate(1.5),
    )  # fmt: skip
    assert operands("op %tid.x, %laneid, _;") == (Special("%tid.x"), Special("%laneid"), Sink())
    (address,) = operands("op [%d1+-16];")
    assert (address.base.name, address.offset) == ("%d1", -16)
    assert operands("op [name+8], [name], name+4;") == (
        Address(Symbol("name"), 8), Address(Symbol("name")), Symbol("name", 4),
    )  # fmt: skip
    (vector,) = operands("op {%r1, _, 3};")
    assert isinstance(vector, Vector) and names(vector.items) == ["%r1", Sink(), Immediate(3)]
    (pair,) = operands("op %r1|%p2;")
    assert isinstance(pair, Pair) and pair.second.name == "%p2"
    (negated,) = operands("op !%p1;")
    assert isinstance(negated, Not) and negated.operand.name == "%p1"
    (tensor,) = operands("op [%d1, {%r1, %r2}];")
    assert [r.name for r in tensor.coordinates[0].items] == ["%r1", "%r2"]


def test_instructions_keep_line_text_and_guard():
    text = module(REGISTERS + "/* a\ncomment */ @!%p3 st.shared.v2.b32\n\t[%r1], // why\n\t{%r2, %r3};")
    (instruction, last) = parse(text).entries["k"].instructions
    assert (instruction.guard.name, instruction.guard_negated) == ("%p3", True)
    assert instruction.opcode == "st.shared.v2.b32"
    assert instruction.text == "@!%p3 st.shared.v2.b32 [%r1], {%r2, %r3};"
    assert text.split("\n")[instruction.line - 1].startswith("comment */ @!%p3")
    assert last.opcode == "ret"


def test_scopes_hide_and_end():
    text = module(
        ".reg .b32 %r<3>;\nop %r1;\n"
        "{\n.reg .b32 %r1, other;\nop %r1, other;\n{ .reg .b64 other; op other; }\n}\n"
        "op %r1;"
    )
    first, inner, innermost, last, _ = parse(text).entries["k"].instructions
    assert first.operands[0] is last.operands[0]
    assert inner.operands[0] is not first.operands[0]
    assert innermost.operands[0].width == 64 and inner.operands[1].width == 32
    with pytest.raises(ParseError, match="symbol where a destination"):
        Program(module("{ .reg .b32 other; }\nmov.u32 other, 0;"))


def test_modules():
    text = """
        .version 8.8
        .target sm_90a, debug
        .address_size 64
        .file 1 "kernel.py"
        .extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);
        .global .align 16 .b8 text[4] = {104, 105, -1, 0};
        .extern .shared .align 1024 .b8 pool[];
        .func helper() { .reg .b32 %r; ret; }
        .visible .entry a(
            .param .u64 .ptr .global .align 16 p,
            .param .align 64 .b8 map[128], .param .b8 flag
        )
        .maxntid 128, 1, 1
        .minnctapersm 1
        { .loc 1 2 3
          .pragma "nounroll";
          ret; }
        .entry b() { exit; }
        .section .debug_str { .b8 0 }
    """
    program = Program(text)
    assert program.target == "sm_90a"
    assert list(program.entries) == ["a", "b"]
    entry = program.entries["a"]
    assert entry.params == (("p", 8, 8), ("map", 128, 64), ("flag", 1, 1))
    assert entry.offsets == (0, 64, 192) and entry.param_bytes == 193
    assert entry.directives == {"maxntid": (128, 1, 1), "minnctapersm": (1,)}
    assert program.storage["text"].tobytes() == b"hi\xff\0"


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("mov.u32 %nothing, 0;", "%nothing is not declared"),
        (".reg .b32 %r<2>;\nmov.u32 %r2, 0;", "%r2 is not declared"),
        (".reg .b33 %r;", "cannot read the register declaration"),
        ("bra NOWHERE;", "unknown label NOWHERE"),
        (".reg .b32 %r;\nmov.u32 %r, 0x;", "cannot read the number"),
        (".reg .b32 %r;\nmov.u32 %r 0;", "expected ,"),
        (".reg .b32 %r;\nmov.u32 %r, [%r;", "expected"),
        (".reg .b32 %r;\nmov.u32 %r, ?;", "cannot read the operands"),
        ("@%p ret;", "%p is not a predicate register"),
        (".reg .b32 %r;\n@%r ret;", "%r is not a predicate register"),
        (".reg .b32 %r;\nmov.u32 %r;", "needs more than 1 operands"),
        (".reg .b32 %r;\nadd.u64 %r, %r, 1;", "has 32 bits where 64 are needed"),
        (".reg .b32 %r;\nmov.u32 %r, 1.5;", "where an integer is needed"),
        (".reg .b32 %r;\nmov.u32 %r, missing;", "missing is not declared"),
        (".reg .b32 %r;\nmov.u32 5, %r;", "where a destination register is needed"),
        ("bar.arrive 0;", "bar.arrive needs more than 1 operands"),
        (".unknown 5;", "unknown directive .unknown"),
    ],
)
def test_bad_text(body, match):
    text = module(body)
    with pytest.raises(ParseError, match=match) as caught:
        Program(text)
    # The message names the line that is wrong: the body's last.
    wanted = text.split("\n").index(body.split("\n")[-1]) + 1
    assert f"PTX line {wanted}" in str(caught.value)


@pytest.mark.parametrize("text", ["", "not PTX", ".version 8.8\n.target sm_80\n.visible .entry k() { ret; "])
def test_not_a_module(text):
    with pytest.raises(ParseError):
        Program(text)


@pytest.mark.parametrize(
    "line",
    [
        "frobnicate.u32 %r0, %r1;",
        "add.rn.cc.u32 %r0, %r1, %r2;",
        "add.u32.u32 %r0, %r1, %r2;",
        "add.rn.rz.f32 %r0, %r1, %r2;",
        "mov.u32 %r0, %clock;",
        "mov.u32 %r0, %smid;",
        "ld.global.v3.u32 {%r0, %r1, %r2}, [%d0];",
        "ld.tensor.u32 %r0, [%d0];",
        "ld.global.u32 %r0, [%d0], %d1;",
        "st.async.shared::cluster.u32 [%r0], %r1, [%r2];",
        "fence.proxy.alias;",
        "mbarrier.pending_count.b64 %r0, %d1;",
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%r0}, %d0, %d1, %r1, 0, %p0, 1, 1, 0, 0;",
        "call (%r0), vprintf, (%d0, %d1);",
        "ex2.f32 %r0, %r1;",
        "vote.sync.ballot.pred %p0, %p1, -1;",
        "bar.sync 0, 64, 3;",
        "redux.sync.add.f32 %r0, %r1, -1;",
        "shfl.bfly.b32 %r0, %r1, 1, 31;",
        "lop3.or.b32 %r0|%p0, %r1, %r2, %r3, 1, %p1;",
        "cp.async.bulk.unknown_group;",
        "prmt.b32.rc8 %r0, %r1, %r2, %r3;",
    ],
)
def test_what_has_no_model_is_refused_when_the_program_is_made(line):
    """Even where it would never run."""
    text = module(REGISTERS + f"bra DONE;\n{line}\nDONE:")
    with pytest.raises(UnmodelledInstruction) as caught:
        Program(text)
    number = text.split("\n").index(line) + 1
    assert f"PTX line {number}: {line}" in str(caught.value)
    assert "is not modelled" in str(caught.value)


def test_the_first_place_named_stays():
    error = EmulatorError("wrong").at(3, "ret;")
    assert str(error.at(9, "bra X;")) == "wrong\n  at PTX line 3: ret;"


def test_the_garbage_collector_is_as_it_was():
    """It rests while a program is made, whatever comes of that."""
    active = gc.isenabled()
    try:
        for wanted in (True, False):
            (gc.enable if wanted else gc.disable)()
            Program(module("ret;"))
            assert gc.isenabled() == wanted
            for wrong in ("add.u32 %r1;", "nonsense;"):
                with pytest.raises(EmulatorError):
                    Program(module(wrong))
                assert gc.isenabled() == wanted
    finally:
        (gc.enable if active else gc.disable)()
