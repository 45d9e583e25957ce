"""Kernels for Blackwell: for now those of the sm80 tree, whose instructions Blackwell runs as well."""

from __future__ import annotations

from ..sm80 import Forward

KERNELS = (Forward,)
