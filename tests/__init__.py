"""Tests; and how numpy multiplies in them.

The emulator's products are numpy's, many at a time. OpenBLAS's kernels for processors with AVX2 add the
terms of a product in an order that depends on how many are computed together; those for older ones do not.
Results are to have the same bits however warps come together: tests take the latter, before numpy is loaded.
"""

import os

os.environ["OPENBLAS_CORETYPE"] = "Nehalem"  # SSE4.2, as compiled host code; as fast for products so small
