"""What ptxas does with products under --fmad=true, its default: PTX text in which they are fused.

PTX leaves open whether `mul` and `add` or `sub` without a rounding modifier are one rounding or two (PTX ISA,
"add": without .rn they "may be optimized aggressively, for example by contraction"). ptxas fuses a product
that nothing but one sum or difference reads:

    mul.f32 p, a, b;   add.f32 d, p, c;    ->    fma.rn.f32 d, a, b, c;

Lines keep their numbers. Of a sum of two such products it is the first that is fused.
"""

from __future__ import annotations

import re
from collections import Counter

_TYPE = r"((?:\.ftz)?\.(?:f32x2|f32|f64))"
_PRODUCT = re.compile(r"\s*mul" + _TYPE + r"\s+(%\w+)\s*,\s*([^,;]+?)\s*,\s*([^,;]+?)\s*;\s*$")
_SUM = re.compile(r"\s*(add|sub)" + _TYPE + r"\s+(%\w+)\s*,\s*([^,;]+?)\s*,\s*([^,;]+?)\s*;\s*$")
_REGISTER = re.compile(r"%[A-Za-z_]\w*")
_ENTRY = re.compile(r"^\.visible \.entry|^\.entry")
_SIGNS = {"f32": ("b32", "0x80000000"), "f64": ("b64", "0x8000000000000000")}
_SIGNS["f32x2"] = ("b64", "0x8000000080000000")


def contracted(text: str) -> str:
    """`text` with the products fused that ptxas fuses."""
    lines, start = text.split("\n"), 0
    entries = [i for i, line in enumerate(lines) if _ENTRY.match(line)]
    for start, end in zip(entries, [*entries[1:], len(lines)], strict=True):
        _contract(lines, start, end)
    return "\n".join(lines)


def _contract(lines: list[str], start: int, end: int) -> None:
    """The same for the lines of one entry, in place."""
    seen = Counter(name for line in lines[start:end] for name in _REGISTER.findall(line))
    products: dict[str, tuple[int, re.Match]] = {}
    for i in range(start, end):
        if match := _PRODUCT.match(lines[i]):
            if seen[match[2]] == 2:  # written here, read once
                products[match[2]] = i, match
        elif match := _SUM.match(lines[i]):
            _fuse(lines, i, match, products)


def _fuse(lines: list[str], i: int, total: re.Match, products: dict[str, tuple[int, re.Match]]) -> None:
    """Make one fma of line `i` and the product that it reads, if there is one of its type."""
    operation, kind, result, *terms = total.groups()
    for place, term in enumerate(terms):
        if term not in products or products[term][1][1] != kind:
            continue
        at, product = products.pop(term)
        factors, other = [product[3], product[4]], terms[1 - place]
        first, declared = "", ""
        if operation == "sub":
            bits, sign = _SIGNS[kind.rpartition(".")[2]]
            negated = factors[0] if place else other
            declared = f".reg .{bits} opposite; "
            first = f"xor.{bits} opposite, {negated}, {sign}; "
            if place:
                factors[0] = "opposite"
            else:
                other = "opposite"
        fma = f"fma.rn{kind} {result}, {factors[0]}, {factors[1]}, {other};"
        lines[i] = "{ " + declared + first + fma + " }" if first else "\t" + fma
        lines[at] = ""
        return
