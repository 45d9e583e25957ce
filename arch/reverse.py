"""What a backward pass asks of a rule, worked out from the expression that the forward pass compiled.

    seen_from_keys    of a mask: which queries see a range of keys (`bounds` tells, from `visible`)
    differentiated    of a score: its derivative by s

A user writes nothing for it, and a rule says what it said when the forward pass ran.
"""

from __future__ import annotations

import functools
from typing import Any

from .bounds import NONE, shown
from .derivative import derivative
from .expression import LARGEST_POSITION, Expression, Node, Section, expression
from .symbol import BOOL, FLOAT, INT, Symbol, leaf, text

EVERYWHERE = -LARGEST_POSITION, LARGEST_POSITION
NOWHERE = -LARGEST_POSITION, -LARGEST_POSITION
_WRITTEN = {"divide_unsigned": "//", "remainder_unsigned": "%"}


@functools.lru_cache(maxsize=4096)
def seen_from_keys(mask: Expression) -> Expression:
    """The mask that is asked by keys. Its sections, with ranges of the positions of queries, half-open:

        visible         as before
        queries         outside of these none sees a key of k_first..k_last
        full_queries    each of these sees every key of k_first..k_last

    An end that is open is one of EVERYWHERE, and no full queries at all are NOWHERE: plain numbers both.
    """
    (visible,) = symbols(mask.sections["visible"])
    seen = shown(visible, "q", leaf("k_first"), leaf("k_last"))
    full = NOWHERE if seen.certain is NONE else seen.certain.ends(*EVERYWHERE)
    return _with(mask, visible=(visible,), queries=seen.possible.ends(*EVERYWHERE), full_queries=full)


@functools.lru_cache(maxsize=4096)
def differentiated(score: Expression) -> Expression:
    """The score with one section, `derivative`: the score and d score / ds, common parts computed once.

    Where a score's slope is infinite or NaN, so is the derivative: where a pair is hidden, do not multiply
    by it, select.
    """
    (found,) = symbols(score.sections["score"])
    return _with(score, derivative=(found, derivative(found)))


def _with(rule: Expression, **sections: tuple[Any, ...]) -> Expression:
    """The expression with the values of a rule and these sections."""
    leaves = rule.text.partition("\n")[0]
    return expression("\n".join([leaves, *(f"{name} = {text(found)}" for name, found in sections.items())]))


def symbols(section: Section) -> tuple[Any, ...]:
    """The values of a section as the symbols, or numbers, that its text was written from."""
    found: list[Any] = []
    for node in section.nodes:
        found.append(_symbol(node, found))
    return tuple(found[result] for result in section.results)


def _symbol(node: Node, found: list[Any]) -> Any:
    """What stands for a node; for a table, its name."""
    if node.op == "constant" or node.op == "leaf" and node.kind.startswith("tensor"):
        return node.args[0]
    if node.op == "leaf":
        return Symbol(FLOAT if node.kind == "float" else INT, node.args[0])
    if node.op == "size":
        return Symbol(INT, "size", found[node.args[0]], node.args[1])
    args = [found[arg] for arg in node.args]
    if node.op in ("as_int32", "as_int64"):  # widths are chosen anew
        return args[0]
    kind = node.kind if node.kind in (BOOL, FLOAT) else INT
    return Symbol(kind, _WRITTEN.get(node.op, node.op), *args)
