"""Every case of tests/cases.py against the float64 reference; long shapes; the emulator against the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .. import measure
from ..worker import Job, Settings

SECONDS = 240.0
CANDIDATES = False
DRY_CASES = ("bfloat16", "varlen_causal", "dropout_0.5")
# Cases that are run on the emulator, too: one per way of loading, masking, scoring and storing.
COMPARED = (
    "bfloat16", "float16", "dims_128_128", "dims_256_256", "dims_192_128", "dims_40_40", "mask_causal",
    "mask_window", "score_softcap", "score_alibi", "varlen_causal", "sink", "dropout_0.5",
)
DRY_COMPARED = ("bfloat16",)
# Head dims, causal, seqlen, batch, heads. The oracle is evaluated on sampled rows.
LARGE = tuple(
    measure.Row(dim, dim_v, causal, seqlen, batch, heads)
    for dim, dim_v, causal, seqlen, batch, heads in (
        (64, 64, True, 4096, 2, 8), (128, 128, False, 8191, 1, 4), (128, 128, True, 32768, 1, 4),
        (192, 128, True, 8192, 1, 4), (256, 256, True, 16384, 1, 2), (256, 256, False, 5000, 2, 4),
        (40, 40, True, 32767, 1, 2), (80, 80, False, 32768, 1, 2),
    )
)
DRY_LARGE = (measure.Row(64, 64, True, 160, 1, 1),)


def jobs(settings: Settings) -> list[Job]:
    """Cases, long shapes, the comparison with the emulator; then the same for every other kernel."""
    from tests.cases import CASES

    dry = settings.dry_run
    names = settings.cases or (DRY_CASES if dry else tuple(CASES))
    compared = [name for name in (DRY_COMPARED if dry else COMPARED) if name in names or not settings.cases]
    large = () if settings.cases else DRY_LARGE if dry else LARGE
    first = [
        *(Job(name, {"kind": "case", "case": name}) for name in names),
        *(Job(f"long {row.key}", {"kind": "long", "row": row}) for row in large),
        *(Job(f"emulator {name}", {"kind": "emulator", "case": name}) for name in compared),
    ]
    others = [
        Job(f"{job.key} ({kernel})", job.payload | {"kernel": kernel})
        for kernel in settings.others for job in first
    ]
    return first + others


def run(job: Job, settings: Settings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One row: an error held to the accuracy rule, or a distance in ulps."""
    from cute_flash.dispatch import only

    kind, kernel = job.payload["kind"], job.payload.get("kernel")
    try:
        with only(kernel):
            if kind == "case":
                yield check(job.payload["case"], settings.machine)
            elif kind == "long":
                yield check_long(job.payload["row"], settings.machine)
            else:
                yield compare(job.payload["case"], settings.machine)
    except NotImplementedError as error:
        if kernel is None:
            raise
        yield {"state": "missing", "error": " ".join(str(error).split())}


def check(name: str, machine: str) -> dict[str, Any]:
    """A case against the reference; AssertionError where it is beyond the bound."""
    from tests.cases import CASES
    from tests.harness import Call

    call = Call.make(CASES[name])
    call.check(machine)
    return {"kind": "case"}


def check_long(row: measure.Row, machine: str) -> dict[str, Any]:
    """A long shape, sampled rows against the reference."""
    import torch

    import cute_flash
    from tests.harness import where

    device = measure.torch_device(machine)
    inputs = row.tensors(device, torch.Generator(device).manual_seed(1))
    out = torch.full((*inputs[0].shape[:-1], row.head_dim_v), torch.nan, dtype=torch.bfloat16, device=device)
    with where(machine):
        cute_flash.flash_attn_func(*inputs, causal=row.causal, out=out)
    return {"kind": "long", "largest error": measure.Oracle(inputs, row.causal).check(out)}


def compare(name: str, machine: str) -> dict[str, Any]:
    """The same kernel, same inputs, on the machine and on the emulator: distance of the outputs in ulps.

    Where the machine is itself the emulator, the second run has its warps and copies in random order.
    """
    from tests.cases import CASES
    from tests.harness import Call, next_rng_state

    call = Call.make(CASES[name])
    if call.case.dropout and machine == measure.CUDA:
        # The generators of the two devices draw different seeds from the same state.
        return {"state": "missing", "error": "dropout's seed is drawn on the device: not comparable"}
    emulated = emulated_name(machine)
    next_rng_state(machine)
    out, lse = call.run(machine)
    next_rng_state(emulated)
    other, other_lse = call.run(emulated, asynchrony="random", schedule="random", seed=1)
    distance = ulps(out, other)
    difference = (lse - other_lse).masked_fill(lse == other_lse, 0.0).abs()
    return {
        "kind": "emulator",
        "emulated": emulated,
        "largest ulps": distance.max().item() if distance.numel() else 0,
        "share different": (distance > 0).double().mean().item() if distance.numel() else 0.0,
        "lse difference": difference.max().item() if difference.numel() else 0.0,
    }


def emulated_name(machine: str) -> str:
    """The emulated device that stands for the GPU at hand: the same capability, so the same kernel."""
    import torch

    from cute_flash.dispatch import EMULATED

    if machine != measure.CUDA:
        return machine
    capability = torch.cuda.get_device_capability()
    for name, device in EMULATED.items():
        if device.capability == capability:
            return name
    raise LookupError(f"none of the emulated devices {', '.join(EMULATED)} has capability {capability}")


def ulps(a, b):
    """How many 16-bit floats lie between a and b, elementwise; equal numbers and two NaNs: 0."""
    import torch

    bits = [x.contiguous().view(torch.int16).int() for x in (a, b)]
    ordered = [torch.where(x < 0, -(x & 0x7FFF), x) for x in bits]
    distance = (ordered[0] - ordered[1]).abs()
    return distance.masked_fill(a.isnan() & b.isnan(), 0)


def markdown(rows: list[dict[str, Any]], data: dict[str, Any]) -> str:
    """Counts, every failure, and the distances from the emulator."""
    lines = []
    for kind, words in (("case", "cases"), ("long", "long shapes")):
        of_kind = [row for row in rows if row.get("kind") == kind]
        lines.append(f"* {words} within the accuracy rule: {len(of_kind)}")
    bad = [row for row in rows if row["state"] != "ok"]
    lines += [f"* **{row['key']}**: {row['state']}, {row['error']}" for row in bad]
    compared = [row for row in rows if row.get("kind") == "emulator"]
    if compared:
        lines += ["", "| against the emulator | largest ulps of out | elements that differ | lse |"]
        lines += ["|---|---|---|---|"]
    for row in compared:
        lines.append(
            f"| {row['key'].removeprefix('emulator ')} ({row['emulated']}) | {row['largest ulps']} "
            f"| {row['share different']:.2%} | {row['lse difference']:.1e} |"
        )
    return "\n".join(lines)
