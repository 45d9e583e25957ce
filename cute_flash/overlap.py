"""Whether tensors share memory: exactly, element by element, also where one is interleaved with the other.

An element of a strided tensor lies at its address plus a sum of stride * index. Two tensors share a byte
where the difference of two such sums is the difference of their addresses: a linear equation in bounded
integers, which is solved from the largest stride on. Each step leaves few choices, because what the smaller
strides can still reach is bounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MOST_STEPS = 100_000  # for strides of a kind that nobody uses: more is taken for an overlap


class _Term(NamedTuple):
    """stride * index with low <= index <= high, in bytes."""

    stride: int
    low: int
    high: int


def span(tensor: torch.Tensor) -> int:
    """Bytes from its first element's first to its last one's last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    return _reach(_dims(tensor)) + 1 if tensor.numel() else 0


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a byte belongs to an element of both."""
    if not (a.numel() and b.numel()):
        return False
    distance = b.data_ptr() - a.data_ptr()
    if not -span(b) < distance < span(a):
        return False
    ours, theirs = _dims(a), _dims(b)
    terms = [_Term(stride, 0, count - 1) for count, stride in ours]
    terms += [_Term(stride, 1 - count, 0) for count, stride in theirs]
    return _solvable(distance, _merged(terms))


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two of its elements share a byte."""
    if tensor.is_contiguous():
        return False
    strides = [stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True) if count > 1]
    if 0 in strides or len(set(strides)) < len(strides):
        return True
    terms = _merged([_Term(stride, 1 - count, count - 1) for count, stride in _dims(tensor)])
    return any(
        _solvable(0, [term._replace(low=1), *terms[place + 1 :]]) for place, term in enumerate(terms)
    )


def _dims(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """(count, stride in bytes) down to single bytes, dimensions that lie one after the other as one."""
    size = tensor.element_size()
    found = [(size, 1)]
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    for count, stride in sorted(((n, s * size) for n, s in dims if n > 1 and s), key=lambda dim: dim[1]):
        inner, step = found[-1]
        if stride == inner * step:
            found[-1] = (inner * count, step)
        else:
            found.append((count, stride))
    return found


def _reach(dims: list[tuple[int, int]]) -> int:
    return sum((count - 1) * stride for count, stride in dims)


def _merged(terms: list[_Term]) -> list[_Term]:
    """Terms of one stride as one, the largest stride first."""
    found: dict[int, _Term] = {}
    for stride, low, high in terms:
        _, other_low, other_high = found.get(stride, (stride, 0, 0))
        found[stride] = _Term(stride, low + other_low, high + other_high)
    return sorted(found.values(), reverse=True)


def _solvable(target: int, terms: list[_Term]) -> bool:
    """Whether the terms, from the largest stride on, can add up to `target`."""
    lows, highs = [0], [0]  # what the last terms can reach together, from none of them on
    for stride, low, high in reversed(terms):
        lows.append(lows[-1] + stride * low)
        highs.append(highs[-1] + stride * high)
    left = [(target, len(terms))]
    for _ in range(MOST_STEPS):
        if not left:
            return False
        rest, count = left.pop()
        if not count:
            return True
        stride, low, high = terms[-count]
        first = max(low, -((highs[count - 1] - rest) // stride))
        last = min(high, (rest - lows[count - 1]) // stride)
        choices = range(first, min(last, first + MOST_STEPS) + 1)
        left += [(rest - stride * index, count - 1) for index in choices]
    return True
