"""What GPUs can hold and how fast their units are: the one table that every bound is computed from.

Sources, by the name that a row gives:
guide       NVIDIA, CUDA C++ Programming Guide 13.0, table "Technical Specifications per Compute Capability"
            and sections "Compute Capability x.y: Architecture", "Shared Memory"
throughput  NVIDIA, CUDA C++ Best Practices Guide 13.0, table "Throughput of Native Arithmetic Instructions"
A100        NVIDIA A100 Tensor Core GPU Architecture, white paper, 2020, tables 1 and 3
H100        NVIDIA H100 Tensor Core GPU Architecture, white paper, 2022, tables 1 and 2 (SXM5); H200 is the
            same chip with other memory (NVIDIA H200 data sheet)
B200        NVIDIA Blackwell data sheet (2.25 PFLOP/s dense bf16 per B200 at 1000 W)
GB300       NVIDIA, "Inside NVIDIA Blackwell Ultra" (2025): 2.5 PFLOP/s dense bf16, 160 SMs on the chip,
            exponentials at twice the rate: 10.7 T/s where Blackwell has 5
FA4         Zadouri et al., FlashAttention-4 (2026), section on B200's feeds and speeds: 8192 FLOP of bf16,
            16 exponentials and 128 bytes of shared memory per clock and SM
FA4#2889    flash-attention's pull request 2889 (2026): "a single SM sustains only ~30 GB/s" of fp32 sums in
            global memory, on an H200; its own and others' kernels reach up to 24 GB/s
HAO         hao-ai-lab, flash-attention-fp4 (2026), measured on GB300: an SM converts 62 pairs of numbers a
            clock to bf16, 32 to e4m3
TK          Spector et al., "GPUs Go Brrr" (2024), and Luo et al., arXiv 2402.13499 (2024), table of mma:
            mma.sync reaches 63 % of the peak on H100, wgmma all of it
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cute_flash.arch.problem import Device
from cute_flash.dispatch import EMULATED

WARP = 32
RESERVED_SHARED = 1024  # bytes of shared memory per CTA that the system takes (guide, 8.x "Shared Memory")
REGISTERS = 65536  # 32-bit, per SM (guide)
PARTITIONS = 4  # quarters of an SM, each with its own warps and registers, issuing a warp a clock (guide)
REGISTER_UNIT = 256  # registers are given to a warp in these steps (NVIDIA's cuda_occupancy.h)
SHARED_UNIT = 128  # bytes of shared memory are given to a CTA in these steps (cuda_occupancy.h)


@dataclass(frozen=True)
class Limits:
    """What one SM holds: warps, CTAs, bytes of shared memory in total (guide)."""

    warps: int
    ctas: int
    shared_memory: int


LIMITS = {
    (8, 0): Limits(64, 32, 164 * 1024),
    (8, 6): Limits(48, 16, 100 * 1024),
    (8, 9): Limits(48, 24, 100 * 1024),
    (9, 0): Limits(64, 32, 228 * 1024),
    (10, 0): Limits(64, 32, 228 * 1024),
    (12, 0): Limits(48, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Occupancy:
    """CTAs per SM, and what sets the number: "registers", "shared memory", "warps" or "CTAs"."""

    ctas: int
    bound: str


def occupancy(capability: tuple[int, int], threads: int, registers: int, shared_memory: int) -> Occupancy:
    """How many CTAs of a kernel one SM holds at a time.

    registers: per thread. shared_memory: bytes per CTA, static and dynamic. KeyError where LIMITS has no row.
    """
    limits = LIMITS[capability]
    warps = -(-threads // WARP)
    per_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    in_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS
    shared = -(-(shared_memory + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
    ways = {
        "registers": in_registers // warps,
        "shared memory": limits.shared_memory // shared,
        "warps": limits.warps // warps,
        "CTAs": limits.ctas,
    }
    bound = min(ways, key=lambda name: ways[name])
    return Occupancy(ways[bound], bound)


@dataclass(frozen=True)
class Gpu:
    """One product: numbers per SM and clock, lanes where not said otherwise.

    arch: the emulated device that it is closest to. matrix: FLOP of dense bf16. mma_sync: the part of it
    that mma.sync reaches. mufu: exponentials. narrowing: of pairs to 8 bits.
    fma: FP32 add, multiply, fma. alu: FP32 compare, minimum, maximum, select. shared: bytes. sums: bytes of
    fp32 sums in global memory, as somebody measured it; 0 where nobody told.
    issue: warp instructions. clock: Hz, at which the products of the row are the data sheet's numbers.
    """

    arch: str
    capability: tuple[int, int]
    sms: int
    clock: float
    matrix: int
    mma_sync: float
    mufu: int
    fma: int
    sources: str
    alu: int = 64
    shared: int = 128
    issue: int = 4
    sums: float = 0.0
    narrowing: int = 64

    @property
    def device(self) -> Device:
        """What kernels are chosen and compiled for."""
        return replace(EMULATED[self.arch], capability=self.capability)

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s."""
        return self.matrix * self.sms * self.clock

    def faster(self, bits: float) -> float:
        """How many times as many FLOP a clock there are of so many bits: twice of FP8 (H100, B200, GB300).

        Of 4 bits four times, as NVIDIA says of B200; GB300, which does more, is taken for as fast.
        """
        return 16 / bits


# min, max, select and packed conversions to bf16 are issued to one unit of 64 lanes (throughput: "compare,
# minimum, maximum" 64); conversions have no number of their own in the guide: 64 is the most they can have,
# where nobody measured them.
# mma.sync's part on B200 and GB300 is not published: 1.0 keeps what is computed from it an upper bound.
HOPPER = Gpu(
    "sm90", (9, 0), 132, 1.830e9, 4096, 0.63, 16, 128, "H100, guide, throughput, TK, FA4#2889",
    sums=30e9 / 1.830e9,
)  # fmt: skip
GPUS = {
    "A100": Gpu("sm80", (8, 0), 108, 1.410e9, 2048, 1.0, 16, 64, "A100, guide, throughput"),
    "H100": HOPPER,
    "H200": HOPPER,
    "B200": Gpu("sm100", (10, 0), 148, 1.860e9, 8192, 1.0, 16, 128, "B200, FA4, throughput"),
    "GB300": Gpu(
        "sm100", (10, 3), 160, 1.910e9, 8192, 1.0, 32, 128, "GB300, FA4, throughput, HAO", narrowing=32
    ),
}
