"""A kernel that must spill: the counterexample of test_resources.py."""

import tempfile

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_compact_tensor


@cute.kernel
def kernel(x: cute.Tensor, y: cute.Tensor):
    """y = x backwards: 64 numbers per thread, all of them in flight at once."""
    thread, _, _ = cute.arch.thread_idx()
    held = cute.make_rmem_tensor(64, cutlass.Float32)
    for i in cutlass.range_constexpr(64):
        held[i] = x[thread, i]
    cute.arch.barrier()
    for i in cutlass.range_constexpr(64):
        y[thread, 63 - i] = held[i]


@cute.jit
def launch(x: cute.Tensor, y: cute.Tensor):
    kernel(x, y).launch(grid=(1, 1, 1), block=(1024, 1, 1))


def compile_for(target: str) -> bytes:
    """The cubin: 1024 threads of a block leave 64 registers for each."""
    x, y = (make_fake_compact_tensor(cutlass.Float32, (1024, 64), stride_order=(0, 1)) for _ in range(2))
    with tempfile.TemporaryDirectory() as directory:
        options = f"--gpu-arch {target} --enable-tvm-ffi --keep-cubin --dump-dir {directory}"
        return cute.compile(launch, x, y, options=options).__cubin__
