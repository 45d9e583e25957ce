"""What this ran on, and two ceilings measured in the same run: large matrix products, a large copy."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import measure
from ..worker import Job, Settings

SECONDS = 60.0
CANDIDATES = False
PACKAGES = (
    "torch", "triton", "nvidia-cutlass-dsl", "apache-tvm-ffi", "cuda-bindings", "numpy",
    "fa3-fwd", "xformers", "flash-attn-4",
)
QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "power.draw",
    "temperature.gpu", "memory.total", "ecc.mode.current", "clocks_event_reasons.active",
)
GEMM, DRY_GEMM = 8192, 128
COPY_BYTES, DRY_COPY_BYTES = 4 << 30, 1 << 20


def jobs(settings: Settings) -> list[Job]:
    """One job per fact."""
    return [Job(key) for key in ("versions", "gpu", "bf16 GEMM", "fp8 GEMM", "copy")]


def run(job: Job, settings: Settings, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A row per fact; ceilings as TFLOP/s or TB/s, with spread."""
    if job.key == "versions":
        yield {"values": versions()}
    elif job.key == "gpu":
        yield gpu(settings.machine)
    else:
        yield ceiling(job.key, settings, say)


def versions() -> dict[str, str]:
    """Python, packages and sources."""
    import torch

    import cute_flash
    from cute_flash.cache import sources_digest

    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["cuda"] = str(torch.version.cuda)
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__
    found["cute_flash"] = str(Path(cute_flash.__file__).parent)
    found["kernel sources"] = sources_digest()[:16]
    found["commit"] = commit()
    found["kernel bundle"] = os.environ.get("CUTE_FLASH_BUNDLE", "none")
    return found


def gpu(machine: str) -> dict[str, Any]:
    """What the driver and torch say of the GPU."""
    if machine != measure.CUDA:
        return {"state": "missing", "error": f"no GPU: {machine} is emulated"}
    import torch

    from cute_flash import cuda_devices

    p, device = torch.cuda.get_device_properties(0), cuda_devices.gpus()[0]
    values = {
        "torch's name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "L2 MiB": p.L2_cache_size >> 20,
        "memory GiB": round(p.total_memory / 2**30, 1),
        "shared memory per block": p.shared_memory_per_block_optin,
        "SM clock at most, MHz": device.clock // 10**6,
        "driver": "CUDA {}.{}".format(*cuda_devices.driver_version()),
    }
    if shutil.which("nvidia-smi") is None:
        return {"values": values | {"nvidia-smi": "missing"}}
    for name in QUERY:
        values[name] = _nvidia_smi(name)
    return {"values": values}


def ceiling(key: str, settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """The rate of a large matrix product or copy on random data."""
    machine, dry = settings.machine, settings.dry_run
    if key == "fp8 GEMM" and machine != measure.CUDA:
        return {"state": "missing", "error": "fp8 products need a GPU"}
    function, work, unit = (_copy if key == "copy" else _gemm)(key, machine, dry)
    repeats = measure.DRY_REPEATS if dry else measure.REPEATS
    times = measure.interleaved({key: function}, machine, repeats, say)[key]
    rates = {name: work / getattr(times, name) / 1e12 for name in ("median", "low", "high")}
    spread = [rates["high"], rates["low"]]
    row = {"rate": rates["median"], "unit": unit, "spread": spread, "count": times.count}
    if machine == measure.CUDA and shutil.which("nvidia-smi"):
        row["SM clock just after"] = _nvidia_smi("clocks.sm")
    return row


def _gemm(key: str, machine: str, dry: bool) -> tuple[Callable[[int], Any], float, str]:
    import torch

    n, device = DRY_GEMM if dry else GEMM, measure.torch_device(machine)
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    if key == "bf16 GEMM":
        return lambda i: a @ b, 2.0 * n**3, "TFLOP/s"
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()  # second operand column-major
    one, options = torch.ones((), device=device), {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    product = lambda i: torch._scaled_mm(a8, b8, one, one, **options)  # noqa: E731
    return product, 2.0 * n**3, "TFLOP/s"


def _copy(key: str, machine: str, dry: bool) -> tuple[Callable[[int], Any], float, str]:
    """Bytes read plus bytes written."""
    import torch

    size, device = DRY_COPY_BYTES if dry else COPY_BYTES, measure.torch_device(machine)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda i: target.copy_(source), 2.0 * size, "TB/s"


def _nvidia_smi(name: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 else "not answered"


def commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if (root / "COMMIT").exists():
        return (root / "COMMIT").read_text().strip()
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def markdown(rows: list[dict[str, Any]], data: dict[str, Any]) -> str:
    """Facts as a list, ceilings as a table."""
    lines = []
    for row in rows:
        lines += [f"* {name}: {value}" for name, value in row.get("values", {}).items()]
    lines += ["", "| ceiling | median | 10 % … 90 % | repeats | SM clock after |", "|---|---|---|---|---|"]
    for row in rows:
        if "rate" in row:
            low, high = row["spread"]
            clock = row.get("SM clock just after", "–")
            lines.append(
                f"| {row['key']} | {row['rate']:.4g} {row['unit']} | {low:.4g} … {high:.4g} "
                f"| {row['count']} | {clock} |"
            )
        elif row["state"] != "ok":
            lines.append(f"| {row['key']} | {row['state']}: {row['error']} | | | |")
    return "\n".join(lines)
