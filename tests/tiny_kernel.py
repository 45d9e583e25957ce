"""The device code of tests/tiny.py: one thread per column, one block per row, head and sequence."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute


@cute.kernel
def kernel(q: cute.Tensor, out: cute.Tensor, lse, scale: cutlass.Float32, values):
    """One row of q."""
    column, _, _ = cute.arch.thread_idx()
    row, head, batch = cute.arch.block_idx()
    if column < q.shape[3]:
        product = q[batch, row, head, column].to(cutlass.Float32) * scale
        out[batch, row, head, column] = product.to(q.element_type)
    if cutlass.const_expr(lse is not None):
        total = cutlass.Float32(0.0)
        if cutlass.const_expr(values is not None):
            for value in values:
                total += cutlass.Float32(value)
        if column == 0:
            lse[batch, head, row] = total


class TinyLauncher:
    """What is compiled."""

    def __init__(self, problem, config):
        self.threads = config.threads

    @cute.jit
    def __call__(
        self, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, sink, rng_state,
        softmax_scale, keep_threshold, keep_scale, max_seqlen_q, block_counts, block_indices, mask_values,
        score_values, multiprocessors, batch_idx, leftpad, page_table, stream: cuda.CUstream,
    ):
        """Operands in their order, and the stream."""
        kernel(q, out, lse, softmax_scale, mask_values).launch(
            grid=[q.shape[1], q.shape[2], q.shape[0]], block=[self.threads, 1, 1], stream=stream
        )
