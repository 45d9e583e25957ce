"""The compiler's types of elements."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from ..precision import Precision

_TYPES = {
    "float16": cutlass.Float16,
    "bfloat16": cutlass.BFloat16,
    "float8_e4m3fn": cutlass.Float8E4M3FN,
    "float8_e5m2": cutlass.Float8E5M2,
    "float4_e2m1fn_x2": cutlass.Float4E2M1FN,
}


def element_type(precision: Precision) -> type:
    """What the compiler calls a format."""
    return _TYPES[precision.name]


def elements(tensor: cute.Tensor, dtype: type) -> cute.Tensor:
    """Bytes as what they stand for."""
    return cute.make_tensor(cute.recast_ptr(tensor.iterator, dtype=dtype), tensor.layout)
