"""Kernels around a few tcgen05 instructions: tensor and shared memory filled before them, read after them.

A CTA has four warps. Thread 0 makes two mbarriers; warp 0 allocates all columns. Registers for the code:
%t, %w, %l thread, warp and lane; %tm the first column; %rank; %data the shared image, at IMAGE_AT; %bar and
%bar+8 the barriers; %r0 … %r9, %s0 … %s9, %p0 … %p9; predicates %first (thread 0) and %issuer (thread 0 of
the even CTA).
"""

from __future__ import annotations

import struct

import numpy as np

from cute_flash import emulator
from cute_flash.emulator import Options

from .evaluate import aligned, module
from .test_mbarrier import wait as _wait

LANES, COLUMNS, THREADS = 128, 512, 128
IMAGE = 64 * 1024  # bytes of the shared image
IMAGE_AT = 1024  # its shared address; behind it are 4 KiB that nothing writes
REGISTERS = ", ".join(f"%v{k}" for k in range(32))

HEAD = f"""
    .reg .b32 %t, %w, %l, %tm, %rank, %data, %bar, %b, %slot, %i, %mine, %r<10>, %v<32>;
    .reg .b64 %image, %tensor, %out, %at, %s<10>;
    .reg .b16 %both, %h<4>;
    .reg .pred %first, %issuer, %go, %p<10>;
    mov.u32 %t, %tid.x;
    shr.u32 %w, %t, 5;
    and.b32 %l, %t, 31;
    mov.u32 %rank, %cluster_ctarank;
    mov.b32 %data, image;
    mov.b32 %bar, bars;
    mov.b32 %b, bars;
    mov.b32 %slot, slot;
    mov.u16 %both, 3;
    setp.eq.u32 %first, %t, 0;
    setp.eq.and.u32 %issuer, %rank, 0, %first;
    mov.u32 %r0, %ctaid.x;
    ld.param.u64 %image, [image_of];
    mad.wide.u32 %image, %r0, {IMAGE}, %image;
    ld.param.u64 %tensor, [tensor_of];
    ld.param.u64 %out, [out_of];
    mad.lo.u32 %r0, %r0, {THREADS}, %t;
    mad.wide.u32 %tensor, %r0, {4 * COLUMNS}, %tensor;
    mad.wide.u32 %out, %r0, {4 * COLUMNS}, %out;
    @%first mbarrier.init.shared.b64 [%bar], 1;
    @%first mbarrier.init.shared.b64 [%bar+8], 1;
    @%first fence.mbarrier_init.release.cluster;
"""
VARIABLES = (
    f".shared .align 1024 .b8 image[{IMAGE}];\n.shared .align 16 .b8 empty[4096];\n"
    ".shared .align 8 .b8 bars[16];\n.shared .align 4 .b8 slot[4];"
)
FILL_SHARED = f"""
    shl.b32 %i, %t, 4;
    fill_shared:
    cvt.u64.u32 %at, %i;
    add.u64 %at, %image, %at;
    ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%at];
    add.u32 %r4, %data, %i;
    st.shared.v4.b32 [%r4], {{%r0, %r1, %r2, %r3}};
    add.u32 %i, %i, {16 * THREADS};
    setp.lt.u32 %go, %i, {IMAGE};
    @%go bra fill_shared;
"""


def _columns(name: str, body: str) -> str:
    """A loop over all columns, 32 at a time: %mine is the warp's address of them, %at that of the image."""
    return f"""
    shl.b32 %mine, %w, 21;
    add.u32 %mine, %mine, %tm;
    mov.b32 %i, 0;
    {name}:
    {body}
    add.u32 %mine, %mine, 32;
    add.u32 %i, %i, 32;
    setp.lt.u32 %go, %i, {COLUMNS};
    @%go bra {name};
    """


_GLOBAL = [(f"%v{k}, %v{k + 1}, %v{k + 2}, %v{k + 3}", 4 * k) for k in range(0, 32, 4)]
FILL_TENSOR = _columns(
    "fill_tensor",
    "mad.wide.u32 %at, %i, 4, %tensor;\n"
    + "\n".join(f"ld.global.v4.b32 {{{names}}}, [%at+{offset}];" for names, offset in _GLOBAL)
    + f"\ntcgen05.st.sync.aligned.32x32b.x32.b32 [%mine], {{{REGISTERS}}};\n"
    "tcgen05.wait::st.sync.aligned;",
)
READ_TENSOR = _columns(
    "read_tensor",
    f"tcgen05.ld.sync.aligned.32x32b.x32.b32 {{{REGISTERS}}}, [%mine];\n"
    "tcgen05.wait::ld.sync.aligned;\nmad.wide.u32 %at, %i, 4, %out;\n"
    + "\n".join(f"st.global.v4.b32 [%at+{offset}], {{{names}}};" for names, offset in _GLOBAL),
)


def together(ctas: int) -> str:
    """All threads of the CTA, or of both CTAs, meet; their accesses of tensor memory are ordered by it."""
    meet = "bar.sync 0;" if ctas == 1 else "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"
    return f"tcgen05.fence::before_thread_sync;\n{meet}\ntcgen05.fence::after_thread_sync;"


def commit(ctas: int = 1, barrier: str = "%bar", parity: int = 0, guard: str = "@%issuer") -> str:
    """One thread commits; everybody waits for what it has issued."""
    form = f"tcgen05.commit.cta_group::{ctas}.mbarrier::arrive::one.shared::cluster"
    form += f".multicast::cluster.b64 [{barrier}], %both;" if ctas == 2 else f".b64 [{barrier}];"
    name = f"committed{barrier.strip('%').replace('+', '_')}_{parity}"
    return f"{guard} {form}\nmov.b32 %b, {barrier.split('+')[0]};\n" + _wait(parity, name).replace(
        "[%b]", f"[{barrier}]"
    )


def kernel(code: str, ctas: int = 1) -> str:
    """The whole kernel around `code`."""
    group = f"cta_group::{ctas}"
    begin = f"""
    setp.ne.u32 %go, %w, 0;
    @%go bra allocated;
    tcgen05.alloc.{group}.sync.aligned.shared::cta.b32 [%slot], {COLUMNS};
    tcgen05.relinquish_alloc_permit.{group}.sync.aligned;
    allocated:
    {together(ctas)}
    ld.shared.b32 %tm, [%slot];
    """
    end = f"""
    {together(ctas)}
    {READ_TENSOR}
    {together(ctas)}
    setp.ne.u32 %go, %w, 0;
    @%go bra done;
    tcgen05.dealloc.{group}.sync.aligned.b32 %tm, {COLUMNS};
    done:
    """
    filling = FILL_SHARED + FILL_TENSOR
    ready = f"fence.proxy.async.shared::cta;\n{together(ctas)}"
    params = ".param .u64 image_of, .param .u64 tensor_of, .param .u64 out_of"
    return module(HEAD + begin + filling + ready + code + end, params, "sm_100a", VARIABLES)


def run(
    code: str, image: np.ndarray | None = None, tensor: np.ndarray | None = None, ctas: int = 1, **options
) -> np.ndarray:
    """Tensor memory of each CTA after `code`: uint32 (ctas, LANES, COLUMNS).

    image: uint8 (ctas, IMAGE), what shared memory holds before; tensor: as the result, likewise. Both random
    where they are not given.
    """
    random = np.random.default_rng(9)
    if image is None:
        image = random.integers(0, 256, (ctas, IMAGE), np.uint8)
    if tensor is None:
        tensor = random.integers(0, 1 << 32, (ctas, LANES, COLUMNS), np.uint32)
    return execute(kernel(code, ctas), image, tensor, **options)


def execute(text: str, image: np.ndarray, tensor: np.ndarray, **options) -> np.ndarray:
    """Run a kernel's text, as `run` does."""
    ctas = len(image)
    arrays = [aligned(np.ascontiguousarray(a).reshape(-1)) for a in (image, tensor)]
    arrays.append(aligned(np.zeros(ctas * LANES * COLUMNS, np.uint32)))
    memory = emulator.GlobalMemory()
    for name, array in zip(("image", "tensor", "out"), arrays, strict=True):
        memory.add(array.ctypes.data, array.nbytes, name)
    params = struct.pack("<3Q", *(a.ctypes.data for a in arrays))
    one = emulator.Launch("k", (ctas, 1, 1), (THREADS, 1, 1), (ctas, 1, 1), 0, params)
    emulator.run(emulator.Program(text), one, memory, Options(**{"races": True, **options}))
    return arrays[2].reshape(ctas, LANES, COLUMNS)
