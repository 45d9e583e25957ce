"""Change one wait, barrier, commit or comparison at a time in our own kernel: the emulator must notice each.

A mutant runs until something objects: an EmulatorError, or the accuracy rule. It is tried with copies that
land as late as waits allow, at once, and at random, the warps in random order, watched by the race detector.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from cute_flash import executable, ops
from cute_flash.arch.sm80 import tuning as sm80
from cute_flash.arch.sm90 import tuning as sm90
from cute_flash.emulated_kernel import EmulatedKernel
from cute_flash.emulator import EmulatorError
from tests.cases import Case
from tests.harness import Call, answer_for

ATTEMPTS = (
    {"asynchrony": "late", "races": True},
    {"asynchrony": "late"},
    {"asynchrony": "eager"},
    *({"asynchrony": "random", "schedule": "random", "seed": seed, "races": True} for seed in range(3)),
)
# Configs of their own, so that tuning does not move the sites. One row block that walks two key blocks or
# more in each of its loops: those that the mask cuts on the right, shows whole, and cuts on the left. And one
# that walks one block that is cut off by the end of the keys, then four whole ones.
WINDOW = Case("", ((100, 450),), heads=(1, 1), mask="wide_window")
FULL = Case("", ((100, 300),), heads=(1, 1))
CASES = {
    ("sm80", "window"): (WINDOW, sm80.Config(128, 64, 4, stages=1)),
    ("sm80", "full"): (FULL, sm80.Config(128, 64, 4, stages=2)),
    ("sm90", "window"): (replace(WINDOW, seqlens=((100, 500),)), sm90.Config(2, 32, 2, 24, 240)),
    ("sm90", "in order"): (FULL, sm90.Config(2, 64, 2, 24, 240, overlap=False)),
    ("sm100", "window"): (replace(WINDOW, seqlens=((200, 700),)), None),
}


@dataclass(frozen=True)
class Mutation:
    """A change of one line of PTX. sites: which lines may be changed; change: what becomes of one."""

    sites: Callable[[list[str]], list[int]]
    change: Callable[[str], str]

    def mutants(self, ptx: str) -> Iterator[tuple[int, str, str]]:
        """(number of the site, its line, the whole changed text) for each site."""
        lines = ptx.splitlines()
        for number, i in enumerate(self.sites(lines)):
            changed = "\n".join([*lines[:i], self.change(lines[i]), *lines[i + 1 :]])
            yield number, f"{i + 1}: {lines[i].strip()}", changed


def matching(opcode: str) -> Callable[[list[str]], list[int]]:
    """Every line with this opcode, guarded or not."""
    pattern = re.compile(rf"\s*(@!?%\w+\s+)?{opcode}\b")
    return lambda lines: [i for i, line in enumerate(lines) if pattern.match(line)]


def mask_comparisons(lines: list[str]) -> list[int]:
    """Eight comparisons, spread evenly, of those that decide whether a score becomes -inf."""
    deciding = set(re.findall(r"selp\.f32\s+%\w+, %\w+, 0fFF800000, (%\w+);", "\n".join(lines)))
    found = matching(r"setp\.(lt|le|gt|ge)\.s32")(lines)
    found = [i for i in found if re.search(r"%p\w*", lines[i])[0] in deciding]
    return found[:: max(1, len(found) // 8)]


def removed(line: str) -> str:
    return f"// {line}"


def one_fewer_waited_for(line: str) -> str:
    """`wait_group n` lets n groups be under way: n + 1."""
    return re.sub(r"(wait_group\S*\s+)(\d+)", lambda found: f"{found[1]}{int(found[2]) + 1}", line)


def negated(line: str) -> str:
    opposite = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le"}
    return re.sub(r"setp\.(\w\w)", lambda found: f"setp.{opposite[found[1]]}", line)


def passed(line: str) -> str:
    """A wait for an mbarrier that is never waited."""
    return re.sub(r"mbarrier\.try_wait\S* (\w+),.*", r"setp.eq.u32 \1, 0, 0;", line)


def with_operand(operation: str) -> Callable[[str], str]:
    """The last number of a line, register or literal, changed by a PTX operation."""

    def change(line: str) -> str:
        guard, opcode, rest, number, end = re.match(
            r"\s*(@!?%?\w+\s+)?(\S+)\s+(.*?, )(%?\w+)((?:, \d+)?);", line
        ).groups(default="")
        changed = f"{opcode} {rest}changed{end};"
        return f"{{ .reg .b32 changed; {operation.format(number)} {guard}{changed} }}"

    return change


COPIES = {
    "no wait": Mutation(matching(r"cp\.async\.wait_group"), removed),
    "a wait for one group fewer": Mutation(matching(r"cp\.async\.wait_group"), one_fewer_waited_for),
    "no barrier": Mutation(matching(r"(bar|barrier)\.sync"), removed),
    "no commit": Mutation(matching(r"cp\.async\.commit_group"), removed),
}
TMA = {
    "no wait for an mbarrier": Mutation(matching(r"mbarrier\.try_wait"), passed),
    "a wait for the other parity": Mutation(
        matching(r"mbarrier\.try_wait"), with_operand("xor.b32 changed, {}, 1;")
    ),
    "no arrival": Mutation(matching(r"mbarrier\.arrive\.(?!expect)"), removed),
    "half the bytes expected": Mutation(
        matching(r"mbarrier\.arrive\.expect_tx"), with_operand("shr.u32 changed, {}, 1;")
    ),
    "twice the bytes expected": Mutation(
        matching(r"mbarrier\.arrive\.expect_tx"), with_operand("shl.b32 changed, {}, 1;")
    ),
    "no bytes expected": Mutation(matching(r"mbarrier\.arrive\.expect_tx"), removed),
    "one arrival more expected": Mutation(
        matching(r"mbarrier\.init"), with_operand("add.u32 changed, {}, 1;")
    ),
    "half the arrivals expected": Mutation(
        matching(r"mbarrier\.init"), with_operand("shr.u32 changed, {}, 1;")
    ),
    "no fence": Mutation(matching(r"fence\.(proxy|mbarrier_init)"), removed),
    "no barrier": Mutation(matching(r"bar\.sync"), removed),
    "no arrival at a barrier": Mutation(matching(r"bar\.arrive"), removed),
    "no commit of a store": Mutation(matching(r"cp\.async\.bulk\.commit_group"), removed),
    "no wait for a store": Mutation(matching(r"cp\.async\.bulk\.wait_group"), removed),
    "no change of registers": Mutation(matching(r"setmaxnreg"), removed),
}
WGMMA = {
    "no fence before a product": Mutation(matching(r"wgmma\.fence"), removed),
    "no commit of a product": Mutation(matching(r"wgmma\.commit_group"), removed),
    "no wait for a product": Mutation(matching(r"wgmma\.wait_group"), removed),
    "a wait for one product fewer": Mutation(matching(r"wgmma\.wait_group"), one_fewer_waited_for),
}
BLACKWELL = {
    "no deallocation": Mutation(matching(r"tcgen05\.dealloc"), removed),
    "no allocation": Mutation(matching(r"tcgen05\.alloc"), removed),
}
MASKS = {"a comparison of the mask negated": Mutation(mask_comparisons, negated)}
# Of Blackwell's kernel, changes of waits, arrivals and commits are not sorted yet into those that nothing can
# notice and those that something must.
UNSORTED = (
    "no wait for an mbarrier",
    "a wait for the other parity",
    "no arrival",
    "one arrival more expected",
    "no arrival at a barrier",
)
BLACKWELL |= {name: mutation for name, mutation in TMA.items() if name not in UNSORTED}
MUTATIONS = {"sm80": COPIES | MASKS, "sm90": TMA | WGMMA | MASKS, "sm100": BLACKWELL | MASKS}
EVERY = [(tree, name, mutation) for tree, name in CASES for mutation in MUTATIONS[tree]]
FRESH = "the first wait for an empty slot: a new barrier lets it pass"
ONCE = "Q's slot is filled once, so nobody waits for it to be empty"
TURNS = "turns decide when products begin, not what they compute"
BUDGET = "how many registers there are is ptxas's business: results do not depend on it"
FENCED = "the product before has a fence, and nothing touches the registers in between"
COVERED = "the next block's wait covers it before O or V's slot is touched"


def harmless(tree: str, case: str, reasons: dict[tuple[str, tuple[int, ...]], str]) -> dict:
    """Entries of HARMLESS for several sites at a time."""
    return {(tree, case, what, site): why for (what, sites), why in reasons.items() for site in sites}


# (architecture, case, mutation, site) -> why nothing can notice it.
HARMLESS = {
    ("sm80", "window", "no commit", 0): "Q joins K's group; the first wait is for every group",
    ("sm80", "window", "no commit", 1): "K joins V's group; the first wait is for every group",
    ("sm80", "window", "no commit", 2): "V joins the next group; the wait for V is for every group",
    ("sm80", "full", "no commit", 0): "Q joins K's group; the wait for K is the first for either",
    **harmless("sm90", "window", {
        ("no wait for an mbarrier", (0, 1)): FRESH,
        ("one arrival more expected", (1,)): ONCE,
        ("half the arrivals expected", (1,)): ONCE,
        ("no barrier", (1, 5)): TURNS,
        ("no change of registers", (1,)): BUDGET,
        ("no fence before a product", (2, 4, 6)): FENCED,
    }),
    **harmless("sm100", "window", {
        ("no commit of a store", (0,)): "the other tile's store closes the group for both",
        ("no change of registers", (0,)): BUDGET,
    }),
    **harmless("sm90", "in order", {
        ("no wait for an mbarrier", (0, 1, 3)): FRESH,
        ("one arrival more expected", (1,)): ONCE,
        ("half the arrivals expected", (1,)): ONCE,
        ("no barrier", (2, 4)): TURNS,
        ("no change of registers", (1,)): BUDGET,
        ("no fence before a product", (2,)): FENCED,
        ("no commit of a product", (1,)): COVERED,
        ("no wait for a product", (1,)): COVERED,
        ("a wait for one product fewer", (1,)): COVERED,
    }),
}


def objection(tree: str, name: str, change: Callable[[str], str], monkeypatch) -> str:
    """What is first said against the kernel of a case when its PTX is changed; empty where nothing is."""
    case, config = CASES[tree, name]

    @functools.cache
    def changed(kernel, problem, tuned, device, route):
        built = executable.artifact(kernel, problem, config or tuned, device)
        return EmulatedKernel(built._replace(ptx=change(built.ptx.decode()).encode()), device)

    monkeypatch.setattr(ops, "executable", changed)
    call = Call.make(case)
    for options in ATTEMPTS:
        try:
            call.check(tree, **options)
        except (EmulatorError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def ptx_of(tree: str, name: str) -> str:
    """The PTX that a case runs."""
    case, config = CASES[tree, name]
    answer = answer_for(case, tree)
    built = executable.artifact(answer.kernel, answer.problem, config or answer.config, answer.device)
    return built.ptx.decode()


@pytest.mark.parametrize("tree, name", CASES)
def test_unchanged_kernel_meets_no_objection(tree, name, monkeypatch):
    assert objection(tree, name, lambda ptx: ptx, monkeypatch) == ""


@pytest.mark.parametrize("tree, name, mutation", EVERY)
def test_every_change_is_noticed(tree, name, mutation, monkeypatch):
    mutants = list(MUTATIONS[tree][mutation].mutants(ptx_of(tree, name)))
    unnoticed = {
        (tree, name, mutation, number): line
        for number, line, text in mutants
        if not objection(tree, name, lambda ptx, text=text: text, monkeypatch)
    }
    assert mutants or mutation.startswith("a comparison")
    assert {site: line for site, line in unnoticed.items() if site not in HARMLESS} == {}
    noticed_after_all = [s for s in HARMLESS if s[:3] == (tree, name, mutation) and s not in unnoticed]
    assert not noticed_after_all, "take these off the list of harmless ones"
