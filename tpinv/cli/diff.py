"""``tpinv diff A B``: where two recorded runs (tpinv.testing.record) part. Names the first module and tensor whose bytes differ, in
the order in which run A computed them, so that what comes before it is known to be the same.

Exit status 0 if everything recorded is the same bytes, 1 if bytes (or dtypes) differ, 2 if nothing differs but something could not be
compared, or if A or B is not the recording of one run, or if their trees say that they cannot agree.
"""

import argparse
import math

from rich.console import Console
from rich.table import Table

from tpinv.diff import Comparison, Run, compare_runs, renamed
from tpinv.harness.outputs import check_outputs, finite, write_json

PHASES = ("parameter", "forward", "recompute", "backward", "gradient")
ARISES = {
    "parameter": "the runs do not hold the same parameters here: before step 0 look at initialisation, later at the optimizer",
    "input": "it arises between that tensor and this module, in code that is no module's own",
    "output": "it arises in this module, whose input is the same bytes",
    "grad_output": "it arises in the backward pass of whatever uses this module's output",
    "grad_input": "it arises in the backward pass of this module, whose grad_output is the same bytes",
    "gradient": "it arises in this parameter's own gradient, or where the gradients of ranks and micro-batches are added",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="directory of a recorded run, the reference")
    parser.add_argument("b", metavar="B", help="directory of another one, of any number of ranks")
    parser.add_argument(
        "--map", action="append", default=[], metavar="OLD=NEW",
        help="regular expression and replacement that turn B's module names into A's; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--partial",
        action="store_true",
        help="do not mind tensors that cannot be compared (in one run only, digests only; other dtypes still fail)",
    )
    parser.add_argument("--rows", type=int, default=10, help="differing tensors to list (default 10)")
    parser.add_argument("--json", metavar="FILE", help="write every tensor that differs or was not compared to FILE")
    parser.add_argument("--plot", metavar="FILE.png", help="draw modules x tensors to FILE.png (needs matplotlib)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    check_outputs(arguments)
    rules = []
    for rule in arguments.map:
        old, equals, new = rule.partition("=")
        if not equals:
            raise ValueError(rf"--map {rule!r} must be OLD=NEW, such as '^decoder\.layers=layers'")
        rules.append((old, new))
    a, b = Run(arguments.a), Run(arguments.b)
    if arguments.rows < 0:
        raise ValueError(f"--rows {arguments.rows} must be at least 0")
    if a.fingerprints and b.fingerprints and a.fingerprints != b.fingerprints:
        raise ValueError(
            f"{a.path} and {b.path} add in different orders and cannot agree: {', '.join(a.fingerprints)} and {', '.join(b.fingerprints)}; "
            "record both with one tree and one version of tpinv"
        )
    renamed(b, rules)
    found = compare_runs(a, b)
    differ = [row for row in found if row.differs]
    unknown = [row for row in found if not row.compared]
    compared = len(found) - len(unknown)
    ok = not differ and compared > 0 and not any(row.unlike or not arguments.partial for row in unknown)

    console = Console(highlight=False)
    for name, which in (("A", a), ("B", b)):
        console.print(f"{name}  {which.path}: {which.ranks} rank{'s' if which.ranks > 1 else ''}, {len(which.parts[0])} tensors each")
    for name in sorted(a.versions.keys() | b.versions.keys()):
        if a.versions.get(name) != b.versions.get(name):
            console.print(f"A and B have other versions of {name}: {a.versions.get(name)} and {b.versions.get(name)}")
    console.print(_phases(found))
    if differ:
        _print_first(found, differ[0], console)
        if len(differ) > 1:
            console.print(_rows(differ[: arguments.rows], len(differ)))
    if unknown:
        console.print(f"{len(unknown)} could not be compared, first {unknown[0].key}: {unknown[0].rule}", soft_wrap=True)
    if not compared:
        console.print("no tensor was compared")
    elif not differ:
        console.print(f"the same bytes in all {compared} tensors compared")
    if arguments.json:
        summary = {"equal": ok, "tensors": len(found), "differing": len(differ), "not_compared": len(unknown)}
        rows = [_json(row) for row in found if row.differs or not row.compared]
        write_json(arguments.json, summary | {"first": _json(differ[0]) if differ else None, "rows": rows})
    if arguments.plot:
        from tpinv.cli.plot import module_map

        module_map(found, arguments.plot, f"{arguments.b} against {arguments.a}")
    if not ok and not differ and not any(row.unlike for row in unknown):
        how = "" if arguments.partial else "; --partial does not mind them"
        raise ValueError(f"nothing differs in {compared} tensors, but {len(unknown)} could not be compared{how}")
    return 0 if ok else 1


def _phases(found: list[Comparison]) -> Table:
    table = Table("phase", "compared", "differ", "not compared", "first that differs")
    for phase in PHASES:
        rows = [row for row in found if row.key.phase == phase]
        differ = [row for row in rows if row.differs]
        if rows:
            compared = sum(row.compared for row in rows)
            table.add_row(phase, str(compared), str(len(differ)), str(len(rows) - compared), str(differ[0].key) if differ else "")
    return table


def _print_first(found: list[Comparison], first: Comparison, console: Console) -> None:
    before = found[: found.index(first)]
    same = [row for row in before if row.compared]
    console.print(f"[bold]first difference[/]  {first.key}", soft_wrap=True)
    if first.rule:
        console.print(f"  {first.rule}")
    console.print(f"  {first.difference or 'digests differ; how far apart the values are was not kept'}", soft_wrap=True)
    if same:
        unknown = f" ({len(before) - len(same)} before it were not compared)" if len(same) < len(before) else ""
        console.print(f"  the last that is the same: {same[-1].key}{unknown}", soft_wrap=True)
    kind = first.key.phase if first.key.phase in ("parameter", "gradient") else first.key.tensor.partition(".")[0]
    console.print(f"  {ARISES[kind]}", soft_wrap=True)
    if first.histogram:
        console.print("  in ulps of the tensor's largest value")
    for power, count in enumerate(first.histogram):
        if not count:
            continue
        label = f"{1 << power >> 1}-{1 << power}"
        console.print(f"  {label:>21} {count:>9} {'█' * math.ceil(40 * count / max(first.histogram))}")


def _rows(rows: list[Comparison], total: int) -> Table:
    table = Table("step", "phase", "module", "tensor", "differ", "at most", "rule", title=f"the first {len(rows)} of {total} that differ")
    for row in rows:
        count, ulp = (f"{row.difference.count} of {row.difference.total}", row.difference.distance) if row.difference else ("?", "?")
        call = f" #{row.key.call + 1}" if row.key.call else ""
        table.add_row(str(row.key.step), row.key.phase, row.key.module or "(model)", row.key.tensor + call, count, ulp, row.rule)
    return table


def _json(row: Comparison) -> dict:
    result = {**row.key._asdict(), "rule": row.rule, "compared": row.compared}
    if row.difference:
        values = {"a": row.difference.expected, "b": row.difference.actual}
        result |= {name: finite(value) for name, value in values.items()}
        result |= {"count": row.difference.count, "total": row.difference.total, "index": row.difference.index}
        result |= {"max_ulp": row.difference.max_ulp, "nonfinite": row.difference.nonfinite, "ulp_histogram": row.histogram}
    return result
