"""The command line: python -m cute_flash demo | features | compile | info | cache."""

from __future__ import annotations

import argparse
import sys

from . import __version__, info, precompile
from .dispatch import features


def main(arguments: list[str]) -> int:
    """Run a command; the exit status."""
    if arguments[:1] == ["demo"]:
        return _demo(arguments[1:])
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
    commands.add_parser("info", help="print what a report of a fault needs")
    command = commands.add_parser("cache", help="print where compiled kernels are kept, and how many")
    command.add_argument("--clear", action="store_true", help="remove them")
    given = parser.parse_args(_directory_first(arguments))
    if given.command == "compile":
        return _compile(given)
    if given.command == "cache":
        print(info.clear() if given.clear else info.cache_line())
    else:
        print(features() if given.command == "features" else info.info())
    return 0


def _demo(arguments: list[str]) -> int:
    try:
        from . import demo

        return demo.main(arguments)
    except ImportError as error:
        print(f"python -m cute_flash demo: {error}", file=sys.stderr)
        return 1


def _compile(given: argparse.Namespace) -> int:
    try:
        return precompile.run(given)
    except (RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error.__cause__, ImportError):
            raise  # not for want of a compiler
        print(f"python -m cute_flash compile: {error}", file=sys.stderr)
        return 1


def _directory_first(arguments: list[str]) -> list[str]:
    """`compile OPTIONS DIR` as `compile DIR OPTIONS`: an option with several values would take DIR, too."""
    command, *rest = arguments or [""]
    if command == "compile" and len(rest) > 1 and rest[0].startswith("-") and not rest[-1].startswith("-"):
        return [command, rest[-1], *rest[:-1]]
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
