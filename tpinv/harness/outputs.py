"""What commands write: paths are checked before the work, not after it."""

import argparse
import importlib
import json
import math
import os
import stat
import tempfile

OPTIONS = ("json", "csv", "plot", "profile")


def check_outputs(arguments: argparse.Namespace) -> None:
    """ValueError naming the option whose file could not be written: no directory, a directory, no permission, a full disk, two options
    with one file, a picture without matplotlib or of an unknown kind. Files that are there are left as they are."""
    paths: dict[str, str] = {}
    for name in OPTIONS:
        path = getattr(arguments, name, None)
        if path is None:
            continue
        if reason := _why_not(path):
            raise ValueError(f"--{name} {path} cannot be written: {reason}")
        if other := paths.get(os.path.realpath(path)):
            raise ValueError(f"--{other} and --{name} are one file, {path}; name two")
        paths[os.path.realpath(path)] = name
    if getattr(arguments, "plot", None) is not None:
        try:
            importlib.import_module("matplotlib")
            supported = importlib.import_module("matplotlib.figure").Figure().canvas.get_supported_filetypes()
        except ImportError as error:
            raise ValueError(f"--plot needs matplotlib ({error}); pip install 'tpinv[plot]'") from error
        if os.path.splitext(arguments.plot)[1].lstrip(".") not in supported:
            raise ValueError(f"--plot {arguments.plot} must end in one of {', '.join(sorted(supported))}")


def _why_not(path: str) -> str:
    """Why ``path`` cannot be written; empty when it can. A file of one block is tried beside it, which a full disk has no room for."""
    directory = os.path.dirname(path) or "."
    if not path:
        return "it has no name"
    if os.path.isdir(path):
        return "it is a directory"
    if not os.path.isdir(directory):
        return f"there is no directory {directory}"
    try:
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):  # a device or a pipe, which is not to be touched twice
            return "" if os.access(path, os.W_OK) else "permission denied"
        if os.path.exists(path):
            with open(path, "ab"):
                pass
        with tempfile.NamedTemporaryFile(dir=directory, prefix=os.path.basename(path)[:64] + ".") as file:
            file.write(bytes(4096))
            file.flush()
        if not os.path.exists(path):  # a name that the file system does not take
            with open(path, "wb"):
                pass
            os.unlink(path)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def write_json(path: str, value) -> None:
    """OSError names the path."""
    text = json.dumps(value, indent=1)
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


def finite(value: float):
    """For JSON, which has no NaN and no infinity: their names."""
    return value if math.isfinite(value) else str(value)
