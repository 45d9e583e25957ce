"""python -m profiling WHAT: measurements, with and without a GPU; `WHAT --help` says more."""

from __future__ import annotations

import importlib
import sys

# What can be asked for: each a module here with main(arguments) -> exit status, loaded when asked for.
WHAT = {
    "report": "check and measure everything on the GPU at hand, in one command",
    "pack": "what a report needs, as a directory to carry to a machine that can install nothing",
    "ncu": "Nsight Compute's counters of one call",
    "one": "a single call, for tools that watch a process",
    "static": "registers, spills, occupancy and hot loop of every kernel, from its machine code",
    "cycles": "what each unit of a GPU allows per KV tile, from the emulator's counts",
    "decode": "what a key costs every unit when decoding, beside the time that memory takes",
    "accuracy": "what formats of 8 and 4 bits cost, from a model of the kernels' arithmetic",
    "timing": "what kernels take, by a model of SMs that is held to published speeds",
    "tune": "configs of a forward kernel by that model, the best beside the table's row",
    "timeline": "a trace and a picture of what every warp and unit of an SM does, by that model",
    "host": "the host's time per call and its parts, without a GPU",
    "emulator": "the emulator's own speed",
    "readme": "write README's performance section from the newest results",
}
# What the first finds, the second prints and keeps.
TABLES = {"static": "static_table", "cycles": "cycles_table", "accuracy": "accuracy_table"}
TABLES |= {"timing": "timing.table", "timeline": "timing.timeline", "tune": "timing.tune"}


def main(arguments: list[str]) -> int:
    """Run a measurement; 2 where there is none of that name."""
    if not arguments or arguments[0] not in WHAT:
        known = "\n".join(f"  {name:10} {meaning}" for name, meaning in WHAT.items())
        wrong = f"no measurement {arguments[0]!r}\n" if arguments and arguments[0][0] != "-" else ""
        print(f"{wrong}python -m profiling WHAT:\n{known}", file=sys.stderr)
        return 2
    module = TABLES.get(arguments[0], arguments[0])
    return importlib.import_module(f"{__package__}.{module}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
