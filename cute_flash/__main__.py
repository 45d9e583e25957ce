"""The command line: python -m cute_flash demo | features | compile."""

from __future__ import annotations

import argparse
import sys

from . import __version__, precompile
from .dispatch import features


def main(arguments: list[str]) -> int:
    """Run a command; the exit status."""
    if arguments[:1] == ["demo"]:
        from .demo import main as demo

        return demo(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m cute_flash", description=__doc__)
    parser.add_argument("--version", action="version", version=f"cute_flash {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="attention in a real encoder, on the GPU or emulated")
    commands.add_parser("features", help="print what is supported where, in Markdown")
    command = commands.add_parser(
        "compile", help="compile kernels ahead of time", description=precompile.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    precompile.add_arguments(command)
    given = parser.parse_args(_directory_first(arguments))
    if given.command == "features":
        print(features())
        return 0
    return precompile.run(given)


def _directory_first(arguments: list[str]) -> list[str]:
    """`compile OPTIONS DIR` as `compile DIR OPTIONS`: an option with several values would take DIR, too."""
    command, *rest = arguments or [""]
    if command == "compile" and len(rest) > 1 and rest[0].startswith("-") and not rest[-1].startswith("-"):
        return [command, rest[-1], *rest[:-1]]
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
