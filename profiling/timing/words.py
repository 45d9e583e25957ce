"""One vocabulary for PTX and machine code: what an instruction does that both languages show.

Words of ORDERED stand in the same order in both: the assembler keeps volatile instructions in place. SHAPE
words it moves between them; how many stand between two ordered ones tells copies of a loop apart.
"""

from __future__ import annotations

import re
from functools import cache

# word -> (PTX opcodes, machine opcodes, each up to its end)
ORDERED = {
    # Of PTX only those that found the phase over; and those that all lanes of a warp have come to.
    "wait": (r"$^", r"SYNCS\.PHASECHK.*"),
    "cluster arrive": (r"$^", r"UCGABAR_ARV.*"),
    "cluster wait": (r"$^", r"UCGABAR_WAIT.*"),
    "arrive": (
        r"mbarrier\.(arrive|expect_tx|complete_tx)\b.*", r"SYNCS\.(?!PHASECHK|EXCH|CCTL).*|ARRIVES\..*",
    ),
    "wgmma": (r"wgmma\.mma_async\b.*", r"[HQI]GMMA\..*"),
    "wgmma wait": (r"wgmma\.wait_group\b.*", r"WARPGROUP\.DEPBAR.*"),
    "sync": (r"(bar|barrier\.cta|barrier)\.(sync|red)\b(?!.*cluster).*", r"BAR\.(SYNC|RED).*"),
    "signal": (r"(bar|barrier\.cta|barrier)\.arrive\b.*", r"BAR\.ARV.*"),
    "load": (
        r"cp\.async\.bulk\.(tensor\.\dd\.)?shared::(cluster|cta)\..*", r"UTMALDG\..*|UBLKCP\.S\..*",
    ),
    "store": (
        r"cp\.(reduce\.)?async\.bulk\.(tensor\.\dd\.)?global\.shared.*",
        r"UTMASTG\..*|UTMAREDG\..*|UBLKCP\.G\..*|UBLKRED\..*",
    ),
    "tensor product": (r"tcgen05\.mma\b.*", r"UTC[HIQO]MMA.*"),
    "tensor commit": (r"tcgen05\.commit\b.*", r"UTCBAR.*"),
    "tensor read": (r"tcgen05\.ld\b.*", r"LDTM\..*"),
    "tensor write": (r"tcgen05\.st\b.*", r"STTM\..*"),
    "copy group": (r"cp\.async\.commit_group\b.*", r"LDGDEPBAR.*"),
}  # fmt: skip
SHAPE = {
    "exponential": (r"ex2\b.*", r"MUFU\.EX2.*"),
    "special": (r"(rcp|lg2|rsqrt|tanh|sin|cos)\.approx\b.*", r"MUFU\.(?!EX2).*"),
    "product": (r"mma\.sync\b.*", r"HMMA\..*"),
    "matrix load": (r"ldmatrix\b.*", r"LDSM\..*"),
    "matrix store": (r"stmatrix\b.*", r"STSM\..*"),
    "copy": (r"cp\.async\.c[ag]\b.*", r"LDGSTS\..*"),
    "shuffle": (r"(shfl|redux)\b.*", r"(SHFL|REDUX|CREDUX)\..*"),
    "vote": (r"vote\b.*", r"VOTE\.(ANY|ALL)"),
    "pack": (r"cvt\.\w+\.(relu\.)?(b?f16x2|e\dm\dx\d).*", r"F2FP\..*"),
    "select": (r"selp\.[bfsu]32\b.*", r"(FSEL|SEL)\b.*"),
    "global load": (r"ld\.global\b.*", r"LDG\..*"),
    "global store": (r"st\.global\b.*", r"STG\..*"),
    "sum": (r"(red|atom)\..*global.*", r"(RED|REDG|ATOMG)\..*"),
    "load shared": (r"ld\.shared\b.*", r"LDS\b.*"),
    "store shared": (r"st\.shared\b.*", r"STS\b.*"),
    "multiply": (r"mul\.f32.*|mul\.rn\.f32.*", r"FMUL\b.*"),
}  # fmt: skip
SHAPES = tuple(SHAPE)
_PLACES = {name: i for i, name in enumerate(SHAPES)}
_TABLES = [
    [(name, re.compile(patterns[side])) for group in (ORDERED, SHAPE) for name, patterns in group.items()]
    for side in (0, 1)
]


@cache
def of_ptx(opcode: str) -> str | None:
    """The word for a PTX opcode; None where it has none."""
    return _word(0, opcode)


@cache
def of_machine(opcode: str) -> str | None:
    """The word for an opcode of machine code; None where it has none."""
    return _word(1, opcode)


def place(word: str) -> int:
    """Where a SHAPE word stands in counts."""
    return _PLACES[word]


def _word(side: int, opcode: str) -> str | None:
    return next((name for name, pattern in _TABLES[side] if pattern.fullmatch(opcode)), None)
