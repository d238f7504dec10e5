"""The command line: ``tpinv`` or ``python -m tpinv``. One module per command, imported when it is asked for."""

import argparse
import importlib
import sys

COMMANDS = {
    "verify": "train a real model at several tensor-parallel sizes, stock and tpinv, and compare every byte",
    "show": "draw the reduction tree and who owns what",
    "probe": "recover and draw the order in which an operation adds",
    "diff": "name the first module and tensor in which two recorded runs differ",
    "bench": "time the kernels against the stock ones, after checking their bits",
    "doctor": "say which kernels this machine uses, and why",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status. Bad input is one line on stderr and status 2; a run that failed is status 3."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="tpinv", description="Tensor-parallel layers whose results are the same bytes at every tensor-parallel size."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    asked = argv[0] if argv and argv[0] in COMMANDS else None
    for name, summary in COMMANDS.items():
        if asked in (None, name):
            subparser = subparsers.add_parser(name, help=summary, description=summary)
            if asked:
                importlib.import_module(f"tpinv.cli.{name}").add_arguments(subparser)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except ValueError as error:
        print(f"tpinv {arguments.command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a rank raised, died or took too long (RankError), or the comparison would be unfair
        print(f"tpinv {arguments.command}: {error}", file=sys.stderr)
        return 3
