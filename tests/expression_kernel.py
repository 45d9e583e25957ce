"""A kernel that evaluates expressions: one thread per number, one row of the results per expression."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute

from cute_flash.arch.expression import expression
from cute_flash.arch.kernel import Kernel, Tuning
from cute_flash.arch.problem import Spec, Support

THREADS = 128


class Operands(NamedTuple):
    """Everything the kernel is launched with. q, k, s: the symbols' values; values: the rule's tables."""

    q: Any
    k: Any
    s: Any
    integers: Any
    floats: Any
    values: Any


@dataclass(frozen=True)
class ExpressionProblem:
    """texts: of expressions with the same leaves, two tables of one dimension, in these dtypes."""

    texts: tuple[str, ...]
    dtypes: tuple[str, str]

    def specs(self) -> Operands:
        """What the kernel is launched with."""

        def spec(dtype: str, *dims: str) -> Spec:
            return Spec(dtype, dims, "contiguous", "numbers")

        return Operands(
            q=spec("int32", "n"), k=spec("int32", "n"), s=spec("float32", "n"),
            integers=spec("int64", "texts", "n"), floats=spec("float32", "texts", "n"),
            values=tuple(spec(dtype, f"size{i}") for i, dtype in enumerate(self.dtypes)),
        )

    def known_sizes(self) -> dict[str, int]:
        """Sizes that compiled code knows."""
        return {"texts": len(self.texts)}

    def example_sizes(self) -> dict[str, int]:
        """Sizes of a small launch."""
        return {"n": THREADS, "size0": THREADS, "size1": THREADS}


@dataclass(frozen=True)
class ExpressionConfig:
    """Nothing to choose."""

    def shared_memory(self, problem: ExpressionProblem) -> int:
        """Bytes of dynamic shared memory: none."""
        return 0


class ExpressionLauncher:
    """What is compiled."""

    def __init__(self, problem: ExpressionProblem, config: ExpressionConfig):
        self.rules = [expression(text) for text in problem.texts]

    @cute.kernel
    def kernel(self, q: cute.Tensor, k: cute.Tensor, s: cute.Tensor, integers, floats, values):
        """A thread's numbers."""
        i = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        if i < q.shape[0]:
            for n in cutlass.range_constexpr(len(self.rules)):
                found = self.rules[n].at(values, 0, 0, 0, 0).score(s[i], 0, 0, q[i], k[i])
                found = cutlass.as_numeric(found)
                if cutlass.const_expr(found.dtype is cutlass.Float32):
                    floats[n, i] = found
                else:
                    integers[n, i] = cutlass.Int64(found)

    @cute.jit
    def __call__(self, *operands_and_stream):
        """Operands in their order, and the stream."""
        *operands, stream = operands_and_stream
        call = Operands(*operands)
        blocks = cute.ceil_div(call.q.shape[0], THREADS)
        self.kernel(*call).launch(grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream)


EXPRESSIONS = Kernel(
    name="tests.expressions",
    operation="forward",
    support=Support(((8, 0), (12, 1)), ("float16",), (64,), frozenset()),
    tuning=Tuning(config=lambda problem, device, sizes: ExpressionConfig()),
    launches="tests.expression_kernel:ExpressionLauncher",
)
