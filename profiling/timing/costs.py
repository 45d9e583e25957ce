"""What one line of machine code asks of the machine: its unit, for how long, and when its result is there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import SimpleNamespace

from .decode import Line

# Units of a scheduler, in the order in which it keeps when each is free. "none": issue slots alone.
UNITS = ("none", "fma", "alu", "mufu", "tensor core", "uniform", "memory queue", "tensor memory")
FMA_OPS = {"FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2", "MOV"}
FMA2_OPS = {"FADD2", "FMUL2", "FFMA2"}
SCOREBOARD_OPS = {"S2R", "S2UR", "R2UR", "VOTEU", "CS2R", "ELECT", "REDUX", "CREDUX"}
CONTROL_OPS = {
    "BRA", "EXIT", "NOP", "BSSY", "BSYNC", "WARPSYNC", "YIELD", "NANOSLEEP", "BREAK", "CALL", "RET",
}  # fmt: skip
_WIDTH = re.compile(r"\.(64|128|256)\b")
_MMA = {"1688": 2 * 16 * 8 * 8, "16816": 2 * 16 * 8 * 16, "16832": 2 * 16 * 8 * 32}
_REGISTER_A = re.compile(r"R\d+, R\d+")
_LAST = re.compile(r"(0x[0-9a-f]+|\d+)\s*$")


@dataclass(slots=True)
class Cost:
    """kind: which of the machine's methods carries it out. interval: clocks of its unit; latency: until its
    result, for who waits by a scoreboard. wavefronts: of shared memory, 128 bytes each. nbytes: that the
    tensor core reads there. number: N of a product, groups that a wait leaves. closes: a wgmma its group; of
    tcgen05, A is in tensor memory.
    """

    kind: str
    unit: int = 0
    interval: float = 1
    latency: float = 0
    wavefronts: float = 0
    nbytes: float = 0
    number: int = 0
    closes: bool = False
    line: Line = field(default=None, repr=False)  # type: ignore[assignment]
    stall: int = 1
    waits: tuple[int, ...] = ()
    result: int = -1
    sources: int = -1
    yields: bool = False

    @property
    def name(self) -> str:
        return self.line.name


def costs(lines: list[Line], chip: SimpleNamespace) -> list[Cost]:
    """Of every line of a kernel."""
    return [cost(line, chip) for line in lines]


def cost(line: Line, chip: SimpleNamespace) -> Cost:
    """Of one line."""
    made = _memory(line, chip) or _matrix(line, chip) or _sync(line, chip) or _arithmetic(line, chip)
    control = line.control
    made.line, made.stall, made.waits = line, max(1, control.stall), control.waits
    made.result = -1 if control.result is None else control.result
    made.sources = -1 if control.sources is None else control.sources
    made.yields = control.yields
    return made


def _arithmetic(line: Line, chip: SimpleNamespace) -> Cost:
    name = line.name
    unit = UNITS.index
    if name == "MUFU":
        exp = "EX2" in line.parts
        interval = chip.exp_interval if exp else chip.special_interval
        return Cost("unit", unit("mufu"), interval, chip.mufu_latency if exp else chip.special_latency)
    if name in ("I2F", "F2I", "F2F", "FRND"):
        return Cost("unit", unit("mufu"), chip.slow_convert_interval, chip.convert_latency)
    if name in FMA_OPS:
        return Cost("unit", unit("fma"), chip.fma_interval, 4)
    if name in FMA2_OPS:
        return Cost("unit", unit("fma"), chip.fma2_interval, 4)
    if name == "IMAD":
        plain = "MOV" in line.parts or "IADD" in line.parts
        return Cost("unit", unit("fma"), chip.fma_interval if plain else chip.imad_interval, 4)
    if name.startswith("FMNMX"):
        return Cost("unit", unit("alu"), chip.minmax_interval, 4)
    if name == "F2FP":
        return Cost("unit", unit("alu"), chip.convert_interval, 6)
    if name in ("LDC", "LDCU", "ULDC"):
        return Cost("unit", 0, 1, chip.constant_latency)
    if name in SCOREBOARD_OPS:
        return Cost("unit", 0, 1, chip.register_latency)
    if name.startswith("U") and not name.startswith("UT"):
        return Cost("unit", unit("uniform"), chip.uniform_interval, 11)
    if name in CONTROL_OPS:
        return Cost("unit", 0, 1, chip.register_latency)
    return Cost("unit", unit("alu"), chip.alu_interval, 4)


def _memory(line: Line, chip: SimpleNamespace) -> Cost | None:
    name, queue = line.name, UNITS.index("memory queue")
    width = int(found[1]) // 8 if (found := _WIDTH.search(line.opcode)) else 4
    lanes = 32 * width / chip.shared_bytes
    if name in ("LDSM", "STSM", "MOVM"):
        many = next((int(part) for part in line.parts if part in ("4", "2")), 1)
        return Cost("shared", queue, chip.queue_interval, chip.shared_latency, many)
    if name in ("LDS", "STS", "ATOMS"):
        return Cost("shared", queue, chip.queue_interval, chip.shared_latency, lanes)
    if name in ("SHFL", "VOTE", "MATCH"):
        if name == "VOTE":
            return Cost("unit", UNITS.index("alu"), chip.alu_interval, chip.register_latency)
        return Cost("shared", queue, chip.queue_interval, chip.shuffle_latency, chip.shuffle_interval)
    if name in ("LDG", "LD", "ATOMG", "ATOM", "LDL"):
        latency = chip.shared_latency + 10 if name == "LDL" else chip.l2_latency
        return Cost("global", queue, chip.queue_interval, latency, lanes)
    if name in ("STG", "ST", "RED", "REDG", "STL"):
        return Cost("global", queue, chip.queue_interval, chip.shared_latency, lanes)
    if name == "LDGSTS":
        return Cost("copy", queue, chip.copy_issue, chip.l2_latency, lanes)
    return None


def _matrix(line: Line, chip: SimpleNamespace) -> Cost | None:
    name, parts = line.name, line.parts
    if name in ("HMMA", "QMMA", "IMMA"):
        flops = next((_MMA[part] for part in parts if part in _MMA), _MMA["16816"])
        return Cost("unit", UNITS.index("tensor core"), flops / chip.mma_flops, 18)
    if name in ("HGMMA", "QGMMA", "IGMMA"):
        m, n, k = map(int, parts[1].split("x"))
        size = 2 if name == "HGMMA" else 1
        rate = chip.matrix_flops * chip.wgmma_reached * 2 / size
        from_registers = _REGISTER_A.match(line.operands) is not None
        nbytes = size * k * (n + m * (not from_registers))
        interval = max(chip.wgmma_floor, 2 * m * n * k / rate, nbytes / chip.shared_bytes)
        return Cost("wgmma", 0, interval, nbytes=nbytes, number=n, closes="gsb0" in line.operands)
    if name == "WARPGROUP":
        if "DEPBAR" in parts:
            return Cost("wgmma wait", number=_last(line))
        return Cost("unit", 0, 1, 0)
    if name.startswith("UTC") and name.endswith("MMA"):
        return Cost("tensor product", closes=line.operands.startswith("tmem"))
    if name == "UTCBAR":
        return Cost("tensor commit")
    if name in ("LDTM", "STTM"):
        return Cost("tensor memory", UNITS.index("tensor memory"), 1, chip.tensor_memory_latency)
    return None


def _sync(line: Line, chip: SimpleNamespace) -> Cost | None:
    name, parts = line.name, line.parts
    if name == "SYNCS" or name == "ARRIVES":
        return Cost("wait" if "PHASECHK" in parts else "arrive", 0, 1, chip.predicate_latency)
    if name == "BAR":
        return Cost("signal" if "ARV" in parts else "sync", 0, 1, chip.named_latency)
    if name == "UTMALDG" or line.opcode.startswith("UBLKCP.S"):
        return Cost("load", 0, 1, chip.register_latency)
    if name in ("UTMASTG", "UTMAREDG", "UBLKRED", "UBLKCP"):
        return Cost("store", 0, 1, chip.register_latency)
    if name == "UTMACMDFLUSH":
        return Cost("flush")
    if name == "LDGDEPBAR":
        return Cost("copy group")
    if name == "DEPBAR":
        return Cost("group wait", number=_last(line))
    if name in ("MEMBAR", "FENCE", "ERRBAR", "CCTL", "UTMACCTL", "UTMAPF"):
        return Cost("unit", 0, 1, chip.fence_latency)
    if name.startswith("UCGABAR"):
        return Cost("cluster arrive" if "ARV" in name else "cluster wait")
    if name == "ACQBULK":
        return Cost("unit")
    return None


def _last(line: Line) -> int:
    found = _LAST.search(line.operands)
    return int(found[1], 0) if found else 0
