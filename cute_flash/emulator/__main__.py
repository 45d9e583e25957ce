"""Run an emitted kernel on random inputs, look for races and missing waits in many orders of events.

    python -m cute_flash compile --emit ptx,json,object --arch sm90 --head-dim 64 --features causal DIR
    python -m cute_flash.emulator DIR/sm90.forward-….json

The exit status is 0 where nothing was found, 1 where something was, 2 where the kernel cannot be run here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .base.errors import EmulatorError
from .front.emitted import Emitted
from .front.portfolio import orders

ORDERS = 24


def main(arguments: list[str]) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cute_flash.emulator", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("kernel", type=Path, metavar="KERNEL.json", help="emitted, with its .ptx and .o beside it")
    add("--orders", type=int, default=ORDERS, metavar="N", help=f"random orders to try; default: {ORDERS}")
    add("--how", metavar="WORDS", help="one run, such as a verdict names: 'random 3 races'")
    add("--size", nargs="+", type=_size, default=[], metavar="NAME=N", help="sizes of dimensions")
    add("--seed", type=int, default=0, help="of the inputs; default: 0")
    given = parser.parse_args(arguments)
    try:
        emitted = Emitted(given.kernel, dict(given.size), given.seed)
    except (OSError, ValueError, EmulatorError) as error:
        print(f"{given.kernel}: {error}", file=sys.stderr)
        return 2
    sizes = ", ".join(f"{name}={size}" for name, size in emitted.sizes.items())
    print(f"{emitted.name} for {emitted.target}: {sizes}", flush=True)
    runs = (given.how,) if given.how else orders(given.orders)
    verdict = emitted.examine(runs, lambda text: print(text, flush=True))
    print(verdict)
    return 0 if verdict else 1


def _size(text: str) -> tuple[str, int]:
    name, equals, number = text.partition("=")
    if not equals or not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=N with N from 1")
    return name, int(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
