"""The command line: ``tpinv`` or ``python -m tpinv``. One module per command, imported when it is asked for.

Exit status, of every command:

    0    what was asked for was done, and what was compared is the same bytes
    1    bytes differ (verify, diff, audit, doctor), or an order is not the promised one (probe); nothing else
    2    anything else: bad input, a file that cannot be read or written, a package that is missing, a rank that failed, a comparison
         that proves nothing. One line on stderr says what; ``--traceback`` shows where
    130  Ctrl-C
"""

import argparse
import importlib
import os
import sys
import traceback

COMMANDS = {
    "verify": "train a real model, yours too, at several tensor-parallel sizes, stock and tpinv, and compare every byte",
    "leaves": "say which numbers of leaves a model's dimensions allow for the tensor-parallel sizes that shall agree",
    "show": "draw the reduction tree and who owns what",
    "probe": "recover and draw the order in which an operation adds",
    "diff": "name the first module and tensor in which two recorded runs differ",
    "bench": "time the kernels against the stock ones, after checking their bits",
    "decode": "decode on a fast server and commit what an invariant one decides, the bytes that it gives alone",
    "audit": "compute a transcript's log-probabilities again, at another tensor-parallel size or in another framework",
    "doctor": "say which kernels this machine uses, and why",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status (above). SystemExit with status 2 for what cannot be parsed, with the usage."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="tpinv", description="Tensor-parallel layers whose results are the same bytes at every tensor-parallel size."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    asked = argv[0] if argv and argv[0] in COMMANDS else None
    try:
        for name, summary in COMMANDS.items():
            if asked in (None, name):
                subparser = subparsers.add_parser(name, help=summary, description=summary)
                subparser.add_argument("--traceback", action="store_true", help="of an error, show where it arose")
                if asked:
                    importlib.import_module(f"tpinv.cli.{name}").add_arguments(subparser)
        arguments = parser.parse_args(argv)
        try:
            status = arguments.run(arguments)
            sys.stdout.flush()  # while an error can still be told
            return status
        except (BrokenPipeError, SystemExit):  # rich leaves with status 1 when whoever reads its output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _say(asked, "nobody reads the output any more", 2)
    except KeyboardInterrupt:
        return _say(asked, "interrupted", 130)
    except Exception as error:  # Python's own status for an error that nobody expected is 1, which is taken
        if "--traceback" in argv:
            traceback.print_exc()
        return _say(asked, _one_line(error), 2)


def _say(command: str | None, message: str, status: int) -> int:
    print(f"tpinv {command}: {message}", file=sys.stderr)
    return status


def _one_line(error: Exception) -> str:
    """What went wrong, in one line: our own errors by their message, others with their kind."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and (name := (error.name or "").partition(".")[0]) and name != "tpinv":
        return f"{name} is missing ({text}); pip install {name}"
    if "HarnessError: " in text:  # which says it all (tpinv/harness/comparison.py)
        text = text.rpartition("HarnessError: ")[2]
    elif "\nTraceback (most recent call last):" in text:  # a RankError, which holds the rank's
        head, _, trace = text.partition("\n")
        text = f"{head.partition(' raised ')[0]} raised {' '.join(_last_error(trace))}; --traceback shows where"
    elif isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, (ValueError, RuntimeError, OSError)) or isinstance(error, UnicodeError):
        text = f"unexpected {type(error).__name__}: {text}; --traceback shows where"
    return " ".join(text.split()) or type(error).__name__


def _last_error(trace: str) -> list[str]:
    """The lines after the last frame of a traceback: the error's type and message."""
    lines = trace.rstrip().splitlines()
    last = max((i for i, line in enumerate(lines) if line.startswith("  File ")), default=-1)
    return [line for line in lines[last + 1 :] if line and not line.startswith(" ")]
