"""Machine code as numbers: what a cubin holds and what its hot loop issues, read with public tools.

`resources` asks cuobjdump for registers, stack and local memory; `loops` disassembles with nvdisasm, finds
the natural loops (Aho, Lam, Sethi, Ullman, 9.6) and counts each one's instructions by class. Blocks that
the compiler moved out of line, such as the slow path of a barrier wait, thus belong to the loop that they
return to. Both tools come from PyPI (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm); no GPU and no CUDA
toolkit is needed.
"""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Class -> opcodes, by the part before the first dot; what is in none of them counts as "integer".
CLASSES = {
    "mma": (
        "HMMA", "IMMA", "QMMA", "OMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA",
    ),
    "mufu": ("MUFU",),
    "fp32": (
        "FADD", "FMUL", "FFMA", "FMNMX", "FMNMX3", "FSETP", "FSEL", "FCHK", "FSET", "FADD2", "FMUL2", "FFMA2",
        "HFMA2", "HADD2", "HMUL2", "HMNMX2", "HSETP2",
    ),
    "conversion": ("F2FP", "F2F", "F2I", "I2F", "FRND", "I2FP", "F2IP", "HADD2_32"),
    "shuffle": ("SHFL", "VOTE", "VOTEU", "REDUX", "CREDUX", "MATCH"),
    "shared": ("LDSM", "LDS", "STSM", "STS", "ATOMS", "MOVM"),
    "tensor": ("LDTM", "STTM", "UTCCP", "UTCATOMSWS"),
    "copy": ("LDGSTS", "UTMALDG", "UTMASTG", "UTMAREDG", "UTMAPF", "UBLKCP", "UBLKRED"),
    "barrier": (
        "BAR", "LDGDEPBAR", "DEPBAR", "ARRIVES", "SYNCS", "WARPSYNC", "WARPGROUP", "MEMBAR", "FENCE",
        "ERRBAR", "UTCBAR", "UTMACMDFLUSH", "UTMACCTL", "CCTL", "NANOSLEEP", "ELECT", "UCGABAR_ARV",
        "UCGABAR_WAIT",
    ),
    "local": ("LDL", "STL"),
    "global": ("LDG", "STG", "LD", "ST", "RED", "ATOM", "ATOMG", "REDG"),
    "control": (
        "BRA", "EXIT", "BSSY", "BSYNC", "BREAK", "NOP", "CALL", "RET", "BRX", "JMP", "YIELD", "PREEXIT",
    ),
    "integer": (),
}  # fmt: skip
_BY_OPCODE = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x?_?\d+):")
_TARGET = re.compile(r"(?:`\(|BRANCH_TARGETS |,)(\.L_x?_?\d+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SHAPES = {"1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32)}
_EM_CUDA = 190


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, stack and local memory in bytes; per block: static shared memory in bytes."""

    registers: int
    stack: int
    shared: int
    local: int


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly. targets: numbers of the instructions that it may jump to."""

    opcode: str
    guard: str
    operands: str
    targets: tuple[int, ...]

    def next(self, here: int) -> tuple[int, ...]:
        """Numbers of the instructions that may follow it."""
        name = self.opcode.partition(".")[0]
        ends = name in ("EXIT", "RET", "BRX", "JMP") or (name == "BRA" and self.operands.startswith("`"))
        after = () if ends and not self.guard else (here + 1,)
        return (*after, *self.targets)


@dataclass(frozen=True)
class Loop:
    """One natural loop: its instructions' numbers and opcodes, nested loops included.

    voted: of each branch in it that a warp's vote decides, in order, the instructions that run only where the
    vote says yes, and only where it says no.
    """

    body: frozenset[int]
    opcodes: tuple[str, ...]
    voted: tuple[tuple[frozenset[int], frozenset[int]], ...] = ()

    @property
    def size(self) -> int:
        return len(self.opcodes)

    @property
    def counts(self) -> Counter:
        """Instructions by class."""
        return Counter(map(classify, self.opcodes))

    @property
    def flops(self) -> int:
        """Floating-point operations of its matrix instructions per warp; 0 where opcodes do not tell."""
        return sum(map(matrix_flops, self.opcodes))

    def alone(self, found: list[Loop]) -> Loop:
        """It without those of `found` that are nested in it."""
        inside = frozenset().union(*(other.body for other in found if other.body < self.body))
        numbered = zip(sorted(self.body), self.opcodes, strict=True)
        kept = {i: opcode for i, opcode in numbered if i not in inside}
        return Loop(frozenset(kept), tuple(kept.values()), self.voted)

    def weights(self, yes: Sequence[float]) -> list[float]:
        """How often each of its instructions runs a pass, where the votes say yes in these shares of it.

        Raises ValueError where there are not as many shares as votes.
        """
        often = [1.0] * self.size
        for (if_yes, if_no), share in zip(self.voted, yes, strict=True):
            for at, number in enumerate(sorted(self.body)):
                often[at] *= share if number in if_yes else 1 - share if number in if_no else 1.0
        return often


def tool(name: str) -> Path:
    """Path of cuobjdump or nvdisasm as PyPI installs it.

    Raises FileNotFoundError naming the package when it is missing.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(root).glob(f"**/bin/{name}")):
            return path
    package = f"nvidia-cuda-{name}"
    raise FileNotFoundError(f"{name} is not installed: pip install {package}, or 'cute_flash[profiling]'")


def tools() -> None:
    """Raise what `tool` raises unless both are there."""
    tool("cuobjdump")
    tool("nvdisasm")


def _run(name: str, cubin: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool(name)), *flags, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> Resources:
    """Registers, stack, shared and local memory of a cubin's only kernel."""
    found = _RESOURCES.findall(_run("cuobjdump", cubin, "--dump-resource-usage"))
    if len(found) != 1:
        raise ValueError(f"expected one kernel in the cubin, cuobjdump reports {len(found)}")
    return Resources(*map(int, found[0]))


def embedded_cubin(data: bytes) -> bytes:
    """The cubin inside a compiled host object: an ELF file for a GPU within one for a CPU.

    Raises ValueError unless there is exactly one.
    """
    at, found = -1, []
    while (at := data.find(b"\x7fELF\x02\x01", at + 1)) >= 0:
        if struct.unpack_from("<H", data, at + 18)[0] == _EM_CUDA:
            phoff, shoff = struct.unpack_from("<QQ", data, at + 32)
            phsize, phnum, shsize, shnum = struct.unpack_from("<HHHH", data, at + 54)
            found.append(data[at : at + max(phoff + phsize * phnum, shoff + shsize * shnum)])
    if len(found) != 1:
        raise ValueError(f"expected one cubin in the object, found {len(found)}")
    return found[0]


def classify(opcode: str) -> str:
    """Class of an opcode, a key of CLASSES."""
    return _BY_OPCODE.get(opcode.partition(".")[0], "integer")


def matrix_flops(opcode: str) -> int:
    """Floating-point operations that one warp does by issuing a matrix instruction; 0 for others.

    wgmma is issued by four warps together, each of which counts a quarter. tcgen05's shape is in a
    descriptor, not in the opcode: 0.
    """
    name, *parts = opcode.split(".")
    if name in ("HMMA", "QMMA", "IMMA"):
        m, n, k = _SHAPES[next(part for part in parts if part in _SHAPES)]
        return 2 * m * n * k
    if name in ("HGMMA", "QGMMA", "IGMMA"):
        m, n, k = map(int, parts[0].split("x"))
        return 2 * m * n * k // 4
    return 0


def local_bytes(opcode: str) -> int:
    """Bytes that one thread loads from or stores to local memory by an instruction; 0 for others."""
    name, *parts = opcode.split(".")
    if name not in CLASSES["local"]:
        return 0
    return next((int(part) // 8 for part in parts if part in ("64", "128")), 4)


def parse(sass: str) -> list[Instruction]:
    """The instructions of nvdisasm's output for one kernel, with the labels resolved."""
    labels: dict[str, int] = {}
    raw: list[tuple[str, str, str]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(raw)
        elif found := _INSTRUCTION.match(line):
            raw.append((found[2], found[1] or "", found[3]))
    return [
        Instruction(opcode, guard, operands, tuple(labels[name] for name in _TARGET.findall(operands)))
        for opcode, guard, operands in raw
    ]


def loops(sass: str) -> list[Loop]:
    """Every natural loop of a disassembly, smallest first; loops with the same head are one."""
    instructions = parse(sass)
    blocks, follow = _blocks(instructions)
    dominators = _dominators(follow)
    edges = [(tail, head) for tail, targets in enumerate(follow) for head in targets]
    before: list[list[int]] = [[] for _ in blocks]
    for tail, head in edges:
        before[head].append(tail)
    bodies: dict[int, set[int]] = {}
    for tail, head in edges:
        if dominators[tail] >> head & 1:
            _gather(bodies.setdefault(head, {head}), tail, before)
    found = []
    for body in bodies.values():
        members = sorted(i for block in body for i in blocks[block])
        decided = (_decided(instructions, blocks, follow, body, block) for block in sorted(body))
        opcodes = tuple(instructions[i].opcode for i in members)
        found.append(Loop(frozenset(members), opcodes, tuple(filter(None, decided))))
    return sorted(found, key=lambda loop: loop.size)


def _decided(
    instructions: list[Instruction],
    blocks: list[range],
    follow: list[tuple[int, ...]],
    body: set[int],
    block: int,
) -> tuple[frozenset[int], frozenset[int]] | None:
    """What follows a block of a loop only where a warp's vote in it says yes, and only where no.

    None where its last branch goes by nothing that it voted on, or where the ways do not meet in the loop.
    """
    last = instructions[blocks[block][-1]]
    told = last.guard.lstrip("!")
    wrote = [i for i in blocks[block] if told and instructions[i].operands.partition(",")[0] == told]
    voted = bool(wrote) and instructions[wrote[-1]].opcode == "VOTE.ANY"
    if not voted or len(follow[block]) != 2 or not body.issuperset(follow[block]):
        return None
    on, taken = (_reached(follow, body, block, arm) for arm in follow[block])
    only = [frozenset(i for b in arm for i in blocks[b]) for arm in (on - taken, taken - on)]
    return tuple(only if last.guard.startswith("!") else only[::-1])


def _reached(follow: list[tuple[int, ...]], body: set[int], block: int, arm: int) -> set[int]:
    """Blocks of a loop that are reached from behind one of them, by an arm of its branch, in one pass."""
    found, pending = set(), [arm]
    while pending:
        at = pending.pop()
        if at in body and at != block and at not in found:
            found.add(at)
            pending += follow[at]
    return found


def _gather(body: set[int], tail: int, before: list[list[int]]) -> None:
    """Add to a loop's blocks, its head among them, all that reach `tail` without passing the head."""
    pending = [tail]
    while pending:
        block = pending.pop()
        if block not in body:
            body.add(block)
            pending += before[block]


def _blocks(instructions: list[Instruction]) -> tuple[list[range], list[tuple[int, ...]]]:
    """Basic blocks, as ranges of instructions, and each one's successors; unreachable blocks stay in."""
    starts = {0}
    for here, instruction in enumerate(instructions):
        starts.update(instruction.targets)
        if instruction.next(here) != (here + 1,):
            starts.add(here + 1)
    edges = sorted(start for start in starts if start < len(instructions))
    blocks = [range(a, b) for a, b in zip(edges, [*edges[1:], len(instructions)], strict=True)]
    number = {block.start: i for i, block in enumerate(blocks)}
    follow = []
    for block in blocks:
        after = instructions[block[-1]].next(block[-1])
        follow.append(tuple(number[i] for i in after if i in number))
    return blocks, follow


def _dominators(follow: list[tuple[int, ...]]) -> list[int]:
    """For each block the set of blocks, as bits, that every path to it passes; 0 where there is no path."""
    order, seen = [], {0}
    pending = [0]
    while pending:
        block = pending.pop()
        order.append(block)
        fresh = [target for target in follow[block] if target not in seen]
        seen.update(fresh)
        pending += fresh
    everything = (1 << len(follow)) - 1
    found = [everything] * len(follow)
    found[0], changed = 1, True
    while changed:
        changed, incoming = False, [everything] * len(follow)
        for block in order:
            for target in follow[block]:
                incoming[target] &= found[block]
        for block in order[1:]:
            updated = incoming[block] | 1 << block
            changed |= updated != found[block]
            found[block] = updated
    return [bits if block in seen else 0 for block, bits in enumerate(found)]


def disassembly(cubin: bytes, *flags: str) -> str:
    """nvdisasm's text of a cubin's code. flags: of nvdisasm, besides."""
    return _run("nvdisasm", cubin, "-c", *flags)


def moved_registers(sass: str) -> tuple[int, ...]:
    """What warps set their registers per thread to, by setmaxnreg, fewest first."""
    found = (i.operands for i in parse(sass) if i.opcode.startswith("USETMAXREG"))
    return tuple(sorted({int(operands.rpartition(" ")[2], 16) for operands in found}))


def hot_loops(sass: str) -> tuple[Loop, ...]:
    """The loops of a disassembly that do the main work: the one with the matrix instructions and, where
    another set of warps does the softmax, the one with the exponentials. Less the loops nested in them: waits
    that turn, and what is seldom due.

    None of a kernel without matrix instructions. Raises ValueError where none of them is in a loop.
    """
    if all(classify(instruction.opcode) != "mma" for instruction in parse(sass)):
        return ()
    found = loops(sass)
    hot = dict.fromkeys((hottest(found, "mma"), hottest(found, "mufu", least=0.25)))
    return tuple(loop.alone(found) for loop in hot)


def transposing(sass: str) -> tuple[Loop, ...]:
    """The loops of a disassembly, if any, in which warps that do no more than that bring tiles into another
    order: by ldmatrix and stmatrix.
    """
    found = (loop for loop in loops(sass) if not loop.counts["mma"] and not loop.counts["mufu"])
    both = {"LDSM", "STSM"}
    return tuple(loop for loop in found if both <= {opcode.partition(".")[0] for opcode in loop.opcodes})[:1]


def hottest(found: list[Loop], kind: str, least: float = 1.0) -> Loop:
    """Of the innermost loops with instructions of a class, that with the most of them.

    Of several equal ones the one without masking, which takes no bits of masks apart (R2P), and is the
    smallest. least: as many as this part of the most count as equal; where nothing is masked, a part of the
    exponentials may be computed by other instructions. A loop with less than half of what the one around it
    has besides is none to look into: it is seldom due.
    """
    held = {loop: loop.alone(found).counts[kind] for loop in found}
    candidates = [loop for loop in found if held[loop]]
    if not candidates:
        raise ValueError(f"no loop of this kernel holds an instruction of the class {kind}")
    nested = [(i, o) for i in candidates for o in candidates if i.body < o.body]
    dropped = {outer if 2 * held[inner] >= held[outer] else inner for inner, outer in nested}
    chosen = [loop for loop in candidates if loop not in dropped]
    most = max(held[loop] for loop in chosen)
    equal = (loop for loop in chosen if held[loop] >= least * most)
    return min(equal, key=lambda loop: (any(opcode.startswith("R2P") for opcode in loop.opcodes), loop.size))
