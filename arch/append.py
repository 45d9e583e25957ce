"""Appending to a KV cache: new keys and values are written where attention will read them, q is rotated.

Rotary embedding (Su et al. 2021) turns pairs of numbers of a row by angles that grow with its position: in
fp32 from 16-bit tables, rounded once. The cache holds rotated keys. Every tree may use the kernel, which is
one of its own before attention's, and not a phase of it:

    launches   one more for a call that appends
    bytes      every new row is read and written once, and so is q: of 1/seqlen_k of what attention reads. A
               phase of attention rotates q again in each part of the keys and each tile, and new keys in
               every CTA that reads them
    risk       none for attention: its loads know nothing of rows that are being written, so that it may bring
               them by TMA, whose proxy does not see other threads' writes without a fence and a barrier, and
               share keys out among CTAs without each having to write what it reads
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .kernel import Kernel, Tuning
from .problem import BesideAttention, Sizes, Spec, Support

WARPS = 4
CHUNK = 8  # 16-bit numbers that a lane takes at a time, 16 bytes


@dataclass(frozen=True)
class AppendProblem(BesideAttention):
    """What appending depends on.

    varlen: q is packed. paged: the cache consists of pages, which a table lists for each sequence.
    batch_idx: sequences use other rows of the cache than their own. rotary_dim: how many numbers of a row are
    rotated, a multiple of 16; 0: none, and there is no q. interleaved: neighbours are a pair, not numbers of
    the first and the second half (GPT-NeoX). rotary_seqlens: positions begin elsewhere than at the new keys.
    """

    operation: ClassVar[str] = "append"
    dtype: str
    head_dim: int
    head_dim_v: int
    varlen: bool = False
    paged: bool = False
    batch_idx: bool = False
    rotary_dim: int = 0
    interleaved: bool = False
    rotary_seqlens: bool = False

    def specs(self) -> AppendOperands:
        """A Spec for every operand, None where there is none. A cache is written in part."""
        rotary, packed = self.rotary_dim > 0, self.rotary_dim > 0 and self.varlen
        cache = ("pages", "page_size") if self.paged else ("batch_cache", "seqlen_cache")
        new, rows_q = ("batch", "seqlen_new"), ("total_q",) if self.varlen else ("batch", "seqlen_q")

        def tensor(dims: tuple[str, ...], meaning: str, present: bool = True, written: bool = False) -> Any:
            return Spec(self.dtype, dims, "strided", meaning, written) if present else None

        def numbers(
            present: bool, dims: tuple[str, ...], meaning: str, values: str = "any", written: bool = False
        ) -> Any:
            strides = "contiguous" if dims else "scalar"
            return Spec("int32", dims, strides, meaning, written, values) if present else None

        table = ("seqlen_rotary", "half_rotary_dim")
        q_dims = (*rows_q, "num_heads_q", "head_dim")
        return AppendOperands(
            k_new=tensor((*new, "num_heads_kv", "head_dim"), "new keys"),
            v_new=tensor((*new, "num_heads_kv", "head_dim_v"), "new values"),
            k_cache=tensor((*cache, "num_heads_kv", "head_dim"), "keys, new ones written among them"),
            v_cache=tensor((*cache, "num_heads_kv", "head_dim_v"), "values, new ones written among them"),
            cache_seqlens=numbers(True, ("batch",), "where each sequence's new keys begin"),
            seqlens=numbers(True, ("batch",), "where they end", written=True),
            cache_batch_idx=numbers(
                self.batch_idx, ("batch",), "row of the cache of each sequence", "numbered 0"
            ),
            block_table=numbers(
                self.paged, ("batch", "max_pages"), "pages of each sequence, in order", "numbered 0"
            ),
            q=tensor(q_dims, "queries", rotary),
            q_rotated=tensor(q_dims, "queries, rotated", rotary, written=True),
            cu_seqlens_q=numbers(
                packed, ("batch_plus_1",), "first row of each sequence in q", "starts total_q"
            ),
            max_seqlen_q=numbers(packed, (), "longest sequence of q: sizes the grid", "longest cu_seqlens_q"),
            rotary_cos=tensor(table, "cosines, by position and pair", rotary),
            rotary_sin=tensor(table, "sines, by position and pair", rotary),
            rotary_seqlens=numbers(self.rotary_seqlens, ("batch",), "position of each first new key"),
            query_step=numbers(rotary, (), "from the position of a query to the next one's: 0 or 1", "is 1"),
        )

    def known_sizes(self) -> dict[str, int]:
        """The dimensions, as Specs name them, that compiled code knows."""
        dims = {"head_dim": self.head_dim, "head_dim_v": self.head_dim_v}
        return dims | {"half_rotary_dim": self.rotary_dim // 2}

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`. A page holds all of a sequence, whose pages are one."""
        cache = {"pages": 2, "page_size": 20, "max_pages": 3} if self.paged else {"batch_cache": 2}
        rows = {"total_q": 20, "batch_plus_1": 3} if self.varlen else {"seqlen_q": 7}
        sizes = {"batch": 2, "seqlen_new": 7, "seqlen_cache": 20, "seqlen_rotary": 30}
        return sizes | cache | rows | {"num_heads_q": 4, "num_heads_kv": 2}


class AppendOperands(NamedTuple):
    """Everything the append kernel is launched with, in launch order; None where there is none."""

    k_new: Any
    v_new: Any
    k_cache: Any
    v_cache: Any
    cache_seqlens: Any
    seqlens: Any
    cache_batch_idx: Any
    block_table: Any
    q: Any
    q_rotated: Any
    cu_seqlens_q: Any
    max_seqlen_q: Any
    rotary_cos: Any
    rotary_sin: Any
    rotary_seqlens: Any
    query_step: Any


@dataclass(frozen=True)
class AppendConfig:
    """warps: of a CTA. lanes: that share a row, a power of two, so that they lie in one warp."""

    lanes: int
    warps: int = WARPS

    @staticmethod
    def of(problem: AppendProblem) -> AppendConfig:
        """As many lanes as take a row of keys or values in one step."""
        chunks = max(problem.head_dim, problem.head_dim_v) // CHUNK
        return AppendConfig(lanes=1 << (chunks - 1).bit_length())

    @property
    def rows(self) -> int:
        """Of heads, that a CTA takes."""
        return 32 * self.warps // self.lanes

    def shared_memory(self, problem: AppendProblem) -> int:
        """Bytes of dynamic shared memory: none."""
        return 0


def _blocks(config: AppendConfig, sizes: Sizes, splits: int) -> int:
    """seqlen_k: the new rows."""
    rows = sizes.seqlen_q * sizes.heads_q + sizes.seqlen_k * sizes.heads_kv
    return -(-rows // config.rows) * sizes.batch


APPEND = Kernel(
    name="common.append",
    operation="append",
    support=Support(
        capabilities=((8, 0), (12, 1)),
        dtypes=("float16", "bfloat16"),
        head_dims=range(8, 577, 8),
        features=frozenset(),
    ),
    tuning=Tuning(config=lambda problem, device, sizes: AppendConfig.of(problem), blocks=_blocks),
    launches=".common.append:AppendKernel",
)
