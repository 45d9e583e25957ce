"""Change one wait, barrier, commit or comparison at a time in our own kernel: the emulator must notice each.

A mutant runs until something objects: an EmulatorError, or the accuracy rule. It is tried with copies that
land as late as waits allow, at once, and at random, the warps in random order, watched by the race detector.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from cute_flash import executable, ops
from cute_flash.emulated_kernel import EmulatedKernel
from cute_flash.emulator import EmulatorError
from tests.cases import Case
from tests.harness import Call

ATTEMPTS = (
    {"asynchrony": "late", "races": True},
    {"asynchrony": "late"},
    {"asynchrony": "eager"},
    *({"asynchrony": "random", "schedule": "random", "seed": seed, "races": True} for seed in range(3)),
)
# Two row blocks, enough key blocks for every stage to be used again, and neither a whole number of blocks.
CASES = {
    "full": Case("full", ((150, 300),), heads=(1, 1)),
    "causal": Case("causal", ((300, 300),), heads=(1, 1), mask="causal"),
    "d128": Case("d128", ((150, 300),), heads=(1, 1), dims=(128, 128)),
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
    return re.sub(r"(wait_group\s+)(\d+)", lambda found: f"{found[1]}{int(found[2]) + 1}", line)


def negated(line: str) -> str:
    opposite = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le"}
    return re.sub(r"setp\.(\w\w)", lambda found: f"setp.{opposite[found[1]]}", line)


MUTATIONS = {
    "no wait": Mutation(matching(r"cp\.async\.wait_group"), removed),
    "a wait for one group fewer": Mutation(matching(r"cp\.async\.wait_group"), one_fewer_waited_for),
    "no barrier": Mutation(matching(r"(bar|barrier)\.sync"), removed),
    "no commit": Mutation(matching(r"cp\.async\.commit_group"), removed),
    "a comparison of the mask negated": Mutation(mask_comparisons, negated),
}
# (case, mutation, site) -> why nothing can notice it.
HARMLESS: dict[tuple[str, str, int], str] = {}


def objection(case: Case, change: Callable[[str], str], monkeypatch, arch: str) -> str:
    """What is first said against the kernel of `case` when its PTX is changed; empty where nothing is."""

    @functools.cache
    def changed(kernel, problem, config, device, route):
        built = executable.artifact(kernel, problem, config, device)
        return EmulatedKernel(built._replace(ptx=change(built.ptx.decode()).encode()), device)

    monkeypatch.setattr(ops, "executable", changed)
    call = Call.make(case)
    for options in ATTEMPTS:
        try:
            call.check(arch, **options)
        except (EmulatorError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def ptx_of(case: Case, monkeypatch, arch: str) -> str:
    """The PTX that a case runs."""
    seen = []
    objection(case, lambda ptx: seen.append(ptx) or ptx, monkeypatch, arch)
    return seen[0]


@pytest.mark.parametrize("name", CASES)
def test_unchanged_kernel_meets_no_objection(name, monkeypatch, arch):
    assert objection(CASES[name], lambda ptx: ptx, monkeypatch, arch) == ""


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_every_change_is_noticed(name, mutation, monkeypatch, arch):
    mutants = list(MUTATIONS[mutation].mutants(ptx_of(CASES[name], monkeypatch, arch)))
    unnoticed = {
        (name, mutation, number): line
        for number, line, text in mutants
        if not objection(CASES[name], lambda ptx, text=text: text, monkeypatch, arch)
    }
    assert len(mutants) >= 2 or mutation.startswith("a comparison")
    assert {site: line for site, line in unnoticed.items() if site not in HARMLESS} == {}
    noticed_after_all = [site for site in HARMLESS if site[:2] == (name, mutation) and site not in unnoticed]
    assert not noticed_after_all, "take these off the list of harmless ones"
