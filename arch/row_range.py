"""Masks whose queries see one range of keys each: a kernel then need not ask for every pair.

    seen    about q: the query sees just the keys with low <= k < high

is a section that `with_row_range` adds to a mask's expression, where `bounds` reads it off `visible`: if what
a query may see is what it sees for certain, it is what it sees. Causal masks, windows, prefixes and whatever
joins such comparisons have one; documents read from tables, or dilated windows, have none.
"""

from __future__ import annotations

import functools

from .bounds import Span, shown
from .expression import Expression, expression
from .reverse import symbols
from .symbol import leaf, text


@functools.lru_cache(maxsize=4096)
def with_row_range(mask: Expression) -> Expression:
    """The mask with a section `seen`, of two 32-bit integers; the mask itself where no range is known."""
    (visible,) = symbols(mask.sections["visible"])
    found = shown(visible, "k", leaf("q"), leaf("q"))
    possible, certain = map(_text, found)
    if possible != certain:
        return mask
    ranged = expression(f"{mask.text}\nseen = {possible}")
    section = ranged.sections["seen"]
    narrow = all(section.nodes[n].kind == "int32" for n in section.results)
    return ranged if narrow else mask


def _text(span: Span) -> str:
    return text(span.ends(0, leaf("seqlen_k")))
