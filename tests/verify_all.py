"""``make verify-all``: every combination that the README's table claims, 5 Adam steps each, SP off and on. About half an hour on two cores.

Prints a line per combination and writes all rows to the file named on the command line (default verify-all.json). With ``--resume``
combinations that the file holds already are not run again.
"""

import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

from tpinv.cli import main

LAYOUTS = ("1,2,4,8", "8"), ("1,3,6", "24")
VARIANTS = ("llama",), ("llama", "--tied"), ("gpt",), ("gpt", "--tied")


def verify_all(path: Path, resume: bool = False) -> int:
    """0 when every combination verified."""
    report = json.loads(path.read_text()) if resume and path.exists() else []
    done = {result["options"] for result in report if result["ok"]}
    failed, report = 0, [result for result in report if result["ok"]]
    combinations = [
        *itertools.product(LAYOUTS, VARIANTS, ("fp32", "bf16"), ("1", "2")),
        *itertools.product(LAYOUTS, [("llama", "--qk-norm")], ["bf16"], ["2"]),
    ]
    for (tp, leaves), variant, dtype, micro_batches in combinations:
        options = ["--tp", tp, "--leaves", leaves, "--variant", *variant, "--dtype", dtype, "--micro-batches", micro_batches]
        if " ".join(options) in done:
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()) as printed:
            file = Path(directory) / "rows.json"
            status = main(["verify", "--sequence-parallel", "--json", str(file), *options])
            result = json.loads(file.read_text()) if file.exists() else {"ok": False, "rows": []}
        report.append({"options": " ".join(options), **result})
        counts = {
            layers: f"{sum(row['differing'] for row in rows)} of {sum(row['tensors'] for row in rows)}"
            for layers in ("stock", "tpinv")
            for rows in [[row for row in result["rows"] if row["layers"] == layers and row["tp"] > 1]]
        }
        print(f"{'ok  ' if status == 0 else 'FAIL'} {' '.join(options)}: differing {counts} ({time.monotonic() - start:.0f} s)", flush=True)
        if status:
            failed += 1
            print(printed.getvalue(), flush=True)
        path.write_text(json.dumps(report, indent=1))
    print(f"{len(report) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    files = [argument for argument in sys.argv[1:] if argument != "--resume"]
    sys.exit(verify_all(Path(files[0] if files else "verify-all.json"), resume="--resume" in sys.argv))
