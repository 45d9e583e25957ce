"""The compiler's types of elements."""

from __future__ import annotations

import cutlass

from ..precision import Precision

_TYPES = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}


def element_type(precision: Precision) -> type:
    """What the compiler calls a format."""
    return _TYPES[precision.name]
