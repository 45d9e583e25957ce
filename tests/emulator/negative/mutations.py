"""What is changed in a kernel's PTX, one line at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


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
    lowest = r"(?:0fFF800000|-8388608)"
    hiding = rf"selp\.[bf]32\s+%\w+, (?:%\w+, {lowest}|{lowest}, %\w+), (%\w+);"
    deciding = set(re.findall(hiding, "\n".join(lines)))
    found = matching(r"setp\.(eq|ne|lt|le|gt|ge)\.[bs]32")(lines)
    return spread([i for i in found if deciding & {*re.findall(r"%p\w*", lines[i])}], 8)


def spread(found: list[int], count: int) -> list[int]:
    """Some of many, evenly."""
    return found[:: max(1, len(found) // count)]


def removed(line: str) -> str:
    return f"// {line}"


def one_fewer_waited_for(line: str) -> str:
    """`wait_group n` lets n groups be under way: n + 1."""
    return re.sub(r"(wait_group\S*\s+)(\d+)", lambda found: f"{found[1]}{int(found[2]) + 1}", line)


def negated(line: str) -> str:
    opposite = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "le": "gt", "gt": "le"}
    return re.sub(r"setp\.(\w\w)", lambda found: f"setp.{opposite[found[1]]}", line)


def passed(line: str) -> str:
    """A wait for an mbarrier that is never waited."""
    return re.sub(r"mbarrier\.try_wait\S* (\w+),.*", r"setp.eq.u32 \1, 0, 0;", line)


def behind(opcode: str) -> Callable[[list[str]], list[int]]:
    """Every line behind one with this opcode."""
    return lambda lines: [i + 1 for i in matching(opcode)(lines)]


def reworded(old: str, new: str) -> Callable[[str], str]:
    """A line with another word in one's place."""
    return lambda line: line.replace(old, new)


def arrived(line: str) -> str:
    """A comparison of what was read with what is waited for, as if it were that."""
    return re.sub(r"(setp\.(?:eq|ne)\.\w+\s+%\w+), %\w+, (%\w+);", r"\1, \2, \2;", line)


def kept(line: str) -> str:
    """An exchange between lanes in which each keeps its own."""
    return re.sub(r"shfl\.sync\.\S+\s+(%\w+)(\|%\w+)?, (%\w+),.*", r"mov.b32 \1, \3;", line)


def everybody(line: str) -> str:
    """An election that all lanes win."""
    return re.sub(r"elect\.sync\s+(%\w+)\|(%\w+),.*", r"mov.b32 \1, 0; setp.eq.u32 \2, 0, 0;", line)


def with_operand(operation: str) -> Callable[[str], str]:
    """The last number of a line, register or literal, changed by a PTX operation."""

    def change(line: str) -> str:
        guard, opcode, rest, number, end = re.match(
            r"\s*(@!?%?\w+\s+)?(\S+)\s+(.*?, )(%?\w+)((?:, \d+)?);", line
        ).groups(default="")
        changed = f"{opcode} {rest}changed{end};"
        return f"{{ .reg .b32 changed; {operation.format(number)} {guard}{changed} }}"

    return change


def at_another(number: int, operation: str) -> Callable[[str], str]:
    """One of a line's addresses, counted from 0, changed by a PTX operation on {}."""

    def change(line: str) -> str:
        found = list(re.finditer(r"\[([^]+]+)(?:\+(\d+))?\]", line))[number]
        changed = f"{line[: found.start()].strip()} [changed]{line[found.end() :]}"
        added = f"add.u32 changed, {found[1]}, {found[2] or 0};"
        return f"{{ .reg .b32 changed; {added} {operation.format('changed, changed')} {changed} }}"

    return change


def to_one_cta(line: str) -> str:
    """A copy to several CTAs of a cluster, or a commit, that comes to the first alone."""
    told = re.sub(r"\], %rs\d+(?=[,;])", "], one", line.strip())
    return f"{{ .reg .b16 one; mov.b16 one, 1; {told} }}"


def copies_between(lines: list[str]) -> list[int]:
    """Copies from one CTA's shared memory to another's."""
    return [i for i, line in enumerate(lines) if "shared::cluster.shared::cta" in line]


def leaders_barriers(lines: list[str]) -> list[int]:
    """Where the leader's barrier is worked out from a CTA's own: for arrivals, and for copies of a pair."""
    copies = r"cp\.async\.bulk\.tensor\S*\.cta_group::2 \[.*\], \[(%r\d+)\], %rd\d+;"
    told = "|".join(sorted(set(re.findall(copies, "\n".join(lines)))))
    pattern = re.compile(rf"\s*(mapa\.\S+\s+%r\d+, %r\d+, 0;|and\.b32\s+({told}), )")
    return [i for i, line in enumerate(lines) if pattern.match(line)]


def own(line: str) -> str:
    """The CTA's own address instead of one in another CTA that it makes out of that."""
    return re.sub(r"(?:mapa|and)\.\S+\s+(%r\d+), (%r\d+), \S+;", r"mov.b32 \1, \2;", line)


def own_for(name: str) -> Callable[[str], str]:
    """The same of one of the addresses that a copy to another CTA makes."""
    return lambda line: re.sub(rf"mapa\.\S+ {name}, (%r\d+), %r\d+;", rf"mov.b32 {name}, \1;", line)


def of_another_byte(lowest_bit: int) -> Callable[[str], str]:
    """A block-scaled product whose descriptor has another scale factor ID, which begins with this bit."""

    def change(line: str) -> str:
        before, word, after = re.match(r"\s*(\S+\s+\[[^]]*\], [^,]+, [^,]+, )(%\w+)(,.*)", line).groups()
        changed = f"xor.b32 changed, {word}, {1 << lowest_bit};"
        return f"{{ .reg .b32 changed; {changed} {before}changed{after} }}"

    return change


def said(anything: int) -> Callable[[str], str]:
    """What becomes of a question whether an answer names a tile."""
    return lambda line: re.sub(r"\S+ (%p\d+), .*", rf"setp.eq.u32 \1, {1 - anything}, 0;", line.strip())


def everywhere(pattern: str, instead: str) -> Callable[[str], str]:
    """Every match in a kernel's PTX replaced; ValueError where there is none."""

    def change(ptx: str) -> str:
        text, count = re.subn(pattern, instead, ptx, flags=re.MULTILINE)
        if not count:
            raise ValueError(f"nothing to change by {pattern}")
        return text

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
    "no barrier of a warp": Mutation(matching(r"bar\.warp\.sync"), removed),
    "no commit of a store": Mutation(matching(r"cp\.async\.bulk\.commit_group"), removed),
    "no wait for a store": Mutation(matching(r"cp\.async\.bulk\.wait_group"), removed),
    "no change of registers": Mutation(matching(r"setmaxnreg"), removed),
    "all lanes elected": Mutation(lambda lines: spread(matching(r"elect\.sync")(lines), 12), everybody),
}
WGMMA = {
    "no fence before a product": Mutation(matching(r"wgmma\.fence"), removed),
    "no commit of a product": Mutation(matching(r"wgmma\.commit_group"), removed),
    "no wait for a product": Mutation(matching(r"wgmma\.wait_group"), removed),
    "a wait for one product fewer": Mutation(matching(r"wgmma\.wait_group"), one_fewer_waited_for),
}
CLUSTER = {
    "no arrival at the cluster's barrier": Mutation(matching(r"barrier\.cluster\.arrive"), removed),
    "no wait at the cluster's barrier": Mutation(matching(r"barrier\.cluster\.wait"), removed),
}
# What CTAs that multiply together tell their leader, hear from it, and send each other.
TOLD = {
    "a commit that reaches one CTA alone": Mutation(
        matching(r"tcgen05\.commit\S*\.multicast::cluster"), to_one_cta
    ),
    "a barrier of this CTA instead of the leader's": Mutation(leaders_barriers, own),
    "a copy to this CTA instead of the other": Mutation(copies_between, own_for("target")),
    "a copy that this CTA's barrier counts": Mutation(copies_between, own_for("barrier")),
}
# What a pair of CTAs that sums gradients exchanges and adds.
EXCHANGED = {
    "no copy to the other CTA": Mutation(copies_between, removed),
    "a half of a tile for one CTA alone": Mutation(
        matching(r"cp\.async\.bulk\.tensor\S*\.multicast::cluster"), to_one_cta
    ),
    "no reduction": Mutation(matching(r"cp\.reduce\.async\.bulk"), removed),
}
ANSWERED = r"clusterlaunchcontrol\.query_cancel\.is_canceled"
# The other slot of two is 16 bytes away.
QUEUE = {
    "no question": Mutation(matching(r"clusterlaunchcontrol\.try_cancel"), removed),
    "an answer to the other slot": Mutation(
        matching(r"clusterlaunchcontrol\.try_cancel"), at_another(0, "xor.b32 {}, 16;")
    ),
    "an answer that another barrier counts": Mutation(
        matching(r"clusterlaunchcontrol\.try_cancel"), at_another(1, "add.u32 {}, 8;")
    ),
    "an answer read from the other slot": Mutation(
        matching(r"ld\.shared\.v2\.b64"), at_another(0, "xor.b32 {}, 16;")
    ),
    "no tile taken for one": Mutation(matching(ANSWERED), said(1)),
    "a tile taken for none": Mutation(matching(ANSWERED), said(0)),
}
MULTICAST = {
    "an answer to the leader alone": Mutation(
        matching(r"clusterlaunchcontrol\.try_cancel"),
        lambda line: line.replace(".multicast::cluster::all", ""),
    ),
}
TCGEN05 = {
    "no deallocation": Mutation(matching(r"tcgen05\.dealloc"), removed),
    "no allocation": Mutation(matching(r"tcgen05\.alloc"), removed),
    "no permit given back": Mutation(matching(r"tcgen05\.relinquish_alloc_permit"), removed),
    "no commit of a product": Mutation(matching(r"tcgen05\.commit"), removed),
    "no wait for a load": Mutation(matching(r"tcgen05\.wait::ld"), removed),
    "no wait for a store to tensor memory": Mutation(matching(r"tcgen05\.wait::st"), removed),
    "no fence before synchronisation": Mutation(matching(r"tcgen05\.fence::before_thread_sync"), removed),
    "no fence after synchronisation": Mutation(matching(r"tcgen05\.fence::after_thread_sync"), removed),
}
FACTORS = {
    "no copy of factors": Mutation(matching(r"tcgen05\.cp"), removed),
    "factors of A of another byte": Mutation(matching(r"tcgen05\.mma\S*block_scale"), of_another_byte(29)),
    "factors of B of another byte": Mutation(matching(r"tcgen05\.mma\S*block_scale"), of_another_byte(4)),
}
# CTAs that add to one sum in turns: a number is read until it is the one waited for, and passed on.
LOOK, WORD = r"ld\.acquire", r"st\.release"
TURNS = {
    "no wait for a turn": Mutation(behind(LOOK), arrived),
    "a look without acquire": Mutation(matching(LOOK), reworded("acquire", "relaxed")),
    "a look that acquires for the CTA alone": Mutation(matching(LOOK), reworded(".gpu", ".cta")),
    "a plain look": Mutation(matching(LOOK), reworded(".acquire.gpu", "")),
    "a word without release": Mutation(matching(WORD), reworded("release", "relaxed")),
    "a word that releases for the CTA alone": Mutation(matching(WORD), reworded(".gpu", ".cta")),
    "a plain word": Mutation(matching(WORD), reworded(".release.gpu", "")),
    "no barrier of a warp": TMA["no barrier of a warp"],
}
# Sums that bulk copies add to: who passes a turn on must know them to be complete, not read alone.
ADDED = {
    "a wait for what is read alone": Mutation(
        matching(r"cp\.async\.bulk\.wait_group"), reworded("wait_group", "wait_group.read")
    ),
}
MASKS = {"a comparison of the mask negated": Mutation(mask_comparisons, negated)}
LANES = {"no exchange between lanes": Mutation(matching(r"shfl\.sync\.bfly"), kept)}
