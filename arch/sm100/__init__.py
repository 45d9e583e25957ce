"""Kernels for Blackwell: for now those of the sm80 tree, whose instructions Blackwell runs as well.

`forward` holds Blackwell's own kernel. It compiles, but is not listed: what is listed has been executed, and
the emulator does not execute tcgen05 yet.
"""

from __future__ import annotations

from ..sm80 import Forward

KERNELS = (Forward,)
