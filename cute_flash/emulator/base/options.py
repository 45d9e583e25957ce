"""What goes into a run and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ASYNCHRONY = ("eager", "late", "late_copies", "late_products", "random")
SCHEDULES = ("lockstep", "random")
UNINITIALIZED = ("error", "poison")
CONTRACT = ("none", "ptxas")
FP8_ACCUMULATOR = ("float32", "hopper")


@dataclass(frozen=True)
class Options:
    """How to run.

    asynchrony: when asynchronous copies and products happen: "eager" at issue, "late" when a wait forces
    them, "random" anywhere between; "late_copies" with eager products, "late_products" with eager copies.
    schedule: "lockstep" (all warps together, deterministic) or "random" (one warp at a time). behind: CTAs of
    this rank run only when none of another rank of its cluster can, so that a cluster's CTAs are as far apart
    in time as waits let them; where there are none nothing is behind. seed: of everything random. races:
    raise where accesses to memory conflict without an order. observers: objects with hooks, see
    core/observe.py. ctas_per_wave: places on the GPU, taken in the order of the grid:
    the next CTAs get theirs when all of a wave have exited, so that who waits for a later CTA than his wave
    has waits for ever; None lets the CTAs' size decide. uninitialized: "error" raises where shared or local
    memory is read that nothing has written; "poison" gives NaN patterns instead, for kernels that load rows
    nobody uses. by_the_book: with races, demand fences and waits that hardware is known to do without, see
    checks/tensor_races.py. ordered_reductions: with races, floating-point sums in global memory must be added
    to in an order, or their bits differ from run to run.
    permissive: accept what PTX leaves undefined or forbids and hardware is known to take, see README.md.
    contract: "none" runs products and sums as written; "ptxas" fuses those that PTX leaves open and the
    assembler makes one instruction of, see ptx/contract.py.
    fp8_accumulator: of wgmma's sums of 8-bit products in f32: "float32" as its registers are, "hopper" as
    short as that hardware's are known to be, see base/short_sums.py.
    """

    asynchrony: str = "eager"
    schedule: str = "lockstep"
    behind: int | None = None
    seed: int = 0
    races: bool = False
    observers: tuple = ()
    ctas_per_wave: int | None = None
    uninitialized: str = "error"
    by_the_book: bool = False
    ordered_reductions: bool = False
    permissive: bool = False
    contract: str = "none"
    fp8_accumulator: str = "float32"

    def __post_init__(self) -> None:
        for name in ("by_the_book", "ordered_reductions"):
            if getattr(self, name) and not self.races:
                raise ValueError(f"{name} is True and races is False; the race detector looks things up")
        if self.by_the_book and self.permissive:
            raise ValueError("by_the_book and permissive are both True, and they are opposites")
        if self.asynchrony not in ASYNCHRONY:
            raise ValueError(f"asynchrony is {self.asynchrony!r}; allowed: {', '.join(ASYNCHRONY)}")
        if self.uninitialized not in UNINITIALIZED:
            allowed = ", ".join(UNINITIALIZED)
            raise ValueError(f"uninitialized is {self.uninitialized!r}; allowed: {allowed}")
        if self.contract not in CONTRACT:
            raise ValueError(f"contract is {self.contract!r}; allowed: {', '.join(CONTRACT)}")
        if self.fp8_accumulator not in FP8_ACCUMULATOR:
            allowed = ", ".join(FP8_ACCUMULATOR)
            raise ValueError(f"fp8_accumulator is {self.fp8_accumulator!r}; allowed: {allowed}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; allowed: {', '.join(SCHEDULES)}")
        if self.behind is not None and self.behind < 0:
            raise ValueError(f"behind is {self.behind}; allowed: None, or a rank from 0 on")

    @classmethod
    def read(cls, how: str, **more: Any) -> Options:
        """Options in words, such as "late races". more: further options, by name.

        eager, late, late_copies, late_products: when asynchronous operations happen. random SEED: they happen
        at random, and warps run in random order. behind RANK: a cluster's CTA of this rank runs when no other
        can. races: look for data races. by_the_book: with races, demand
        what hardware does without. ordered_reductions: with races, floating-point sums need an order.
        permissive: accept what hardware takes. poison: shared memory that nobody wrote may be read.
        """
        found: dict[str, Any] = {}
        words = how.replace(",", " ").split()
        while words:
            word = words.pop(0)
            if word == "random":
                seed = words.pop(0) if words and words[0].isdigit() else "0"
                found |= {"asynchrony": word, "schedule": word, "seed": int(seed)}
            elif word == "behind" and words and words[0].isdigit():
                found[word] = int(words.pop(0))
            elif word in ASYNCHRONY:
                found["asynchrony"] = word
            elif word in ("by_the_book", "ordered_reductions"):
                found |= {"races": True, word: True}
            elif word in ("races", "permissive"):
                found[word] = True
            elif word == "poison":
                found["uninitialized"] = word
            else:
                allowed = "races, by_the_book, ordered_reductions, permissive, poison"
                first = f"{', '.join(ASYNCHRONY[:-1])}, random SEED, behind RANK"
                raise ValueError(f"how has {word!r}; allowed: {first}, {allowed}")
        return cls(**{**found, **more})


@dataclass(frozen=True)
class Launch:
    """One kernel launch. shared_memory: dynamic bytes. params: the parameter block as PTX lays it out.

    registers: per thread, as the assembler has it; None where that is not known. Only setmaxnreg asks.
    """

    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    shared_memory: int = 0
    params: bytes = b""
    registers: int | None = None


@dataclass
class Report:
    """What a run did.

    instructions: warp instructions executed. opcodes, lines: the same by opcode and by PTX line; lines lists
    every instruction of the entry, 0 where none ran. waves: batches of CTAs.
    """

    instructions: int = 0
    seconds: float = 0.0
    opcodes: dict[str, int] = field(default_factory=dict)
    lines: dict[int, int] = field(default_factory=dict)
    waves: int = 0
