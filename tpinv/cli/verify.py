"""``tpinv verify``: the claim, checked on this machine. Trains a real model, or yours (``--model``), at several tensor-parallel sizes, with
the stock layers and with tpinv, and compares every logit, loss, gradient, gradient norm and final parameter with those of TP = 1, byte for byte.

Exit status 0 only if tpinv differs nowhere and the stock run differs somewhere: a comparison that cannot fail proves nothing (status 2).
"""

import argparse
import contextlib
import importlib
import math
import os
import time
import warnings

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tpinv.harness.comparison import Row, train_and_compare
from tpinv.harness.outputs import check_outputs, write_json
from tpinv.testing import RankPool
from tpinv.tree import ReductionTree

FRAMEWORKS = {"megatron": "tpinv.harness.megatron.verify", "torchtitan": "tpinv.harness.torchtitan.verify"}
PLAIN = "tpinv.harness.plain"  # what --model may be of besides
ENGINES = {"vllm": "tpinv.harness.vllm.verify"}  # which serve instead of training: a comparison of their own
VARIANTS = "llama (default): RMSNorm, SwiGLU, grouped queries, rope; gpt: LayerNorm, GELU, biases, learned positions"
COLUMNS = {"layers": "left", "TP": "right", "SP": "left", "differing": "right", "first that differs": "left", "loss per step": "left"}
# What describes the model of verify's own, and a model of yours says itself.
OF_OUR_MODEL = ("hidden", "num_layers", "spec", "variant", "tied", "qk_norm", "recompute", "distributed_optimizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="MODULE:FUNCTION",
        help="train your own model: a factory as my_package.my_module:build or path/file.py:build (docs/verify.md); vllm: serve this "
        "checkpoint directory",
    )  # fmt: skip
    parser.add_argument(
        "--framework", choices=["plain", *sorted(FRAMEWORKS | ENGINES)],
        help="whose model and training loop (default megatron; with --model: what the factory's module imports, else plain), or engine",
    )  # fmt: skip
    parser.add_argument(
        "--across", metavar="LIST", help="one checkpoint in several frameworks, as transformers,megatron,torchtitan,vllm; logits and "
        "log-probabilities are compared. --model: a Hugging Face directory (default: random Llama and Qwen3, small or of --hidden)",
    )  # fmt: skip
    parser.add_argument("--vllm-python", metavar="PATH", help="--across: the interpreter of an environment that has vLLM and tpinv")
    parser.add_argument("--tp", default="1,2,4,8", help="tensor-parallel sizes, compared with 1 (default 1,2,4,8)")
    parser.add_argument("--sequence-parallel", action="store_true", help="run every size above 1 with sequence parallelism as well")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of parameters and activations (default fp32)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (default 5)")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches per step (default 1)")
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="cuda: NCCL if every rank has a GPU, else ranks share GPUs over gloo"
    )
    parser.add_argument("--hidden", type=int, help="hidden size, about, with heads of 128 (default: as small as can be)")
    parser.add_argument("--num-layers", type=int, help="transformer layers (default 2)")
    parser.add_argument("--leaves", type=int, default=8, help="leaves of the tree, a multiple of every size (default 8; 24 for 3 and 6)")
    parser.add_argument(
        "--spec", choices=["local", "te"], help="megatron: its local layers (default) or TransformerEngine's, which must be there"
    )
    parser.add_argument("--variant", choices=["llama", "gpt"], help=VARIANTS)
    parser.add_argument("--tied", action="store_true", help="share the embedding with the output layer")
    parser.add_argument("--qk-norm", action="store_true", help="normalise queries and keys")
    parser.add_argument("--recompute", action="store_true", help="recompute every layer's activations in the backward pass")
    parser.add_argument("--distributed-optimizer", action="store_true", help="Megatron's distributed optimizer")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--plot", metavar="FILE.png", help="draw a heat map of all tensors to FILE.png (needs matplotlib)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one run may take (default 600)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    sizes = _sizes(arguments)
    tree = ReductionTree(arguments.leaves)
    for size in sizes:
        tree.owned(0, size)
    check_outputs(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU; there is none here")
    if arguments.across:
        from tpinv.cli import across

        return across.run(arguments, sizes)
    if arguments.framework in ENGINES:
        return importlib.import_module(ENGINES[arguments.framework]).run(arguments)
    console = Console()
    framework, settings, about = _own_model(arguments, sizes) if arguments.model else _our_model(arguments, sizes)
    console.print(
        f"[bold]{tree.fingerprint}[/]  {about} {arguments.dtype} on {arguments.device}, {arguments.steps} steps of "
        f"{arguments.micro_batches} micro-batches", soft_wrap=True,
    )  # fmt: skip
    rows = _compare_all(arguments, sizes, framework, settings, console)
    console.print(_table(rows, arguments.dtype))
    ours, stock, unknown = _sums(rows)
    _verdict(rows, console)
    ok = not ours and not unknown and stock > 0
    if arguments.json:
        write_json(arguments.json, {"fingerprint": tree.fingerprint, "ok": ok, "rows": [_json(row) for row in rows]})
    if arguments.plot:
        from tpinv.cli.plot import heat_map

        heat_map(rows, arguments.plot, f"{about} {arguments.dtype}, {tree.fingerprint}")
    if not ours and unknown:
        raise ValueError(
            f"{unknown} tensors could not be compared, so this run proves nothing about them; docs/verify.md says what to name"
        )
    if not ours and not stock:
        raise ValueError("the stock layers do not differ either, so this run proves nothing; use more steps or larger sizes")
    return 0 if ok else 1


def _sizes(arguments: argparse.Namespace) -> tuple[int, ...]:
    """All sizes, 1 among them. Also refuses numbers that no run could have, with the option's name."""
    try:
        named = [int(size) for size in arguments.tp.split(",")]
    except ValueError:
        raise ValueError(f"--tp {arguments.tp!r} must be integers separated by commas, such as 1,2,4,8") from None
    if min(named) < 1 or max(named) < 2:
        raise ValueError(f"--tp {arguments.tp!r} must name at least one size above 1, and none below 1, such as 1,2,4,8")
    if len(set(named)) < len(named):
        raise ValueError(f"--tp {arguments.tp!r} names a size twice; name each once")
    if arguments.steps < 1 or arguments.micro_batches < 1:
        raise ValueError(f"--steps {arguments.steps} and --micro-batches {arguments.micro_batches} must be at least 1")
    for name in ("hidden", "num_layers"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if not 0 < arguments.timeout < math.inf:
        raise ValueError(f"--timeout {arguments.timeout:g} must be a positive number of seconds")
    return tuple(sorted({1, *named}))


# -- what is trained --------------------------------------------------------------------------------------------------------------


def _our_model(arguments: argparse.Namespace, sizes: tuple[int, ...]):
    """The framework's name, settings(framework, layers, size, sp), and a title, for verify's own small model."""
    framework = arguments.framework or "megatron"
    if framework not in FRAMEWORKS:
        raise ValueError(f"--framework {framework} has no model of its own; name yours with --model")
    variant = arguments.variant or "llama"
    given = {name: getattr(arguments, name) for name in ("device", "hidden", "num_layers", "spec", "recompute", "distributed_optimizer")}
    given = {name: value for name, value in given.items() if value not in ("cpu", None, False)}

    def settings(module, layers: str, size: int, sp: bool):
        if unknown := given.keys() - module.Run.__dataclass_fields__.keys():
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unknown))
            raise ValueError(f"{names} cannot be chosen for {framework}; leave it out")
        return module.Run(
            layers=layers, tp=size, sequence_parallel=sp, sizes=sizes, leaves=arguments.leaves, variant=variant, dtype=arguments.dtype,
            steps=arguments.steps, micro_batches=arguments.micro_batches, tied=arguments.tied, qk_norm=arguments.qk_norm, **given,
        )  # fmt: skip

    about = f"{framework} {variant}{' of TransformerEngine' if arguments.spec == 'te' else ''}{' tied' if arguments.tied else ''}{' qk-norm' if arguments.qk_norm else ''}"
    return framework, settings, about


def _own_model(arguments: argparse.Namespace, sizes: tuple[int, ...]):
    """The same for the user's."""
    from tpinv.harness.own import OwnRun, framework_of, load_factory

    if told := [name for name in OF_OUR_MODEL if getattr(arguments, name)]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in told)
        raise ValueError(f"{names} would describe verify's own model; with --model the factory says what is built")
    with warnings.catch_warnings():  # of which Megatron-Core has a lot
        warnings.simplefilter("ignore")
        factory = load_factory(arguments.model)
    framework = arguments.framework or framework_of(factory)

    def settings(module, layers: str, size: int, sp: bool):
        return OwnRun(
            model=arguments.model, layers=layers, tp=size, sequence_parallel=sp, sizes=sizes, leaves=arguments.leaves, dtype=arguments.dtype,
            steps=arguments.steps, micro_batches=arguments.micro_batches, device=arguments.device,
        )  # fmt: skip

    return framework, settings, f"{arguments.model} ({framework})"


# -- running and reporting --------------------------------------------------------------------------------------------------------


def _compare_all(arguments: argparse.Namespace, sizes: tuple[int, ...], name: str, settings, console: Console) -> list[Row]:
    # TP = 1 first, of which rank 0 keeps the recording; then the largest, so that every worker has shared memory as often as its peers of a
    # smaller size: torch counts that per process, and ranks whose counts differ would wait for each other (collectives/symmetric.py).
    downwards = [1, *sorted(set(sizes) - {1}, reverse=True)]
    layouts = [(size, sp) for size in downwards for sp in ((False, True) if arguments.sequence_parallel and size > 1 else (False,))]
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True
    )
    module = PLAIN if name == "plain" else FRAMEWORKS[name]
    rows: list[Row] = []
    # The fork server must not touch CUDA, which whatever a framework imports may do.
    preload = [module] if arguments.device == "cpu" else []
    with warnings.catch_warnings(), bar, _environment_of_workers(arguments.device), RankPool(preload=preload) as pool:
        warnings.simplefilter("ignore")
        task = bar.add_task(f"importing {name}", total=2 * len(layouts))
        framework = _import(module, name)
        runs = [(layers, size, sp, settings(framework, layers, size, sp)) for layers in ("stock", "tpinv") for size, sp in layouts]
        for layers, size, sp, run_settings in runs:
            bar.update(task, description=f"{layers}  TP={size}{'  SP' if sp else ''}")
            job = (framework.train_own, run_settings) if arguments.model else (framework.train, run_settings)
            started = time.monotonic()
            row = pool.run(
                train_and_compare, size, *job, bool(arguments.model), timeout=arguments.timeout, device=arguments.device
            )[0]  # fmt: skip
            rows.append(row)
            bar.advance(task)
            which = f"{layers} TP={size}{' SP' if sp else ''}"
            if not console.is_terminal:  # which shows no bar, and the table comes last
                found = "trained" if size == 1 else f"{row.differing} of {row.tensors} differ"
                console.print(f"{which}: {found}, {time.monotonic() - started:.0f} s")
            if row.loaded:
                console.print(f"{which}: {row.loaded} initial tensors depended on TP; it started from those of TP=1")
    return sorted(rows, key=lambda row: (row.layers, row.tp, row.sp))  # stock, then tpinv


def _import(module: str, name: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} cannot be imported ({error}); pip install 'tpinv[{name}]'") from error


@contextlib.contextmanager
def _environment_of_workers(device: str):
    """What workers inherit: no GPUs for a comparison on the CPU, and no warnings, of which Megatron-Core has a lot."""
    saved = dict(os.environ)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.update({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _table(rows: list[Row], dtype: str) -> Table:
    table = Table(
        title="tensors whose bytes differ from TP=1", title_justify="left",
        caption=f"ulp: of {dtype}, at the tensor's largest value", caption_justify="left",
    )  # fmt: skip
    for name, justify in COLUMNS.items():
        table.add_column(name, justify=justify, overflow="fold")
    previous = None
    for row in rows:
        if previous not in (None, row.layers):
            table.add_section()
        previous = row.layers
        if row.tp == 1:
            found, first = "reference", ""
        else:
            color = "red" if row.differing else "green"
            found = f"[{color}]{row.differing} of {row.tensors}[/]"
            largest = "NaN or inf" if math.isinf(row.max_ulp) else f"{row.max_ulp:.3g}"
            first = f"{row.first_difference}  ({row.first_distance}; at most {largest} anywhere)" if row.differing else ""
            if row.not_compared:
                name, why = next(iter(row.not_compared.items()))
                found += f", [yellow]{len(row.not_compared)} not compared[/]"
                first = "\n".join(filter(None, (first, f"not compared: {name}, {why}")))
        table.add_row(row.layers, str(row.tp), "on" if row.sp else "off", found, first, " ".join(f"{loss:.6f}" for loss in row.losses))
    return table


def _sums(rows: list[Row]) -> tuple[int, int, int]:
    """Differing tensors of tpinv, of stock, and those of tpinv that could not be compared."""
    ours, stock = (sum(row.differing for row in rows if row.layers == layers) for layers in ("tpinv", "stock"))
    return ours, stock, sum(len(row.not_compared) for row in rows if row.layers == "tpinv")


def _verdict(rows: list[Row], console: Console) -> None:
    ours, stock, unknown = _sums(rows)
    count = sum(row.tensors for row in rows if row.layers == "tpinv" and row.tp > 1)
    if ours:
        console.print("[red]tpinv differs: this is a bug, or a part of the model that tpinv does not cover[/]")
    elif unknown:
        console.print(f"[yellow]tpinv: the same bytes in {count - unknown} of {count} comparisons, the others could not be made[/]")
    elif not stock:
        console.print("[red]the stock layers do not differ either, so this run proves nothing; use more steps or larger sizes[/]")
    else:
        console.print(f"[green]tpinv: the same bytes in all {count} comparisons[/]; stock layers: {stock} of them differ")
    if not any(row.loaded for row in rows):
        console.print("initial weights were the same bytes at every size")


def _json(row: Row) -> dict:
    names = ("layers", "tp", "sp", "tensors", "differing", "first_difference")
    listed = {name: getattr(row, name) for name in names}
    listed["max_ulp"] = row.max_ulp if math.isfinite(row.max_ulp) else "NaN or inf"  # JSON has neither
    listed["losses"] = [loss if math.isfinite(loss) else None for loss in row.losses]
    return listed | ({"not_compared": row.not_compared} if row.not_compared else {}) | ({"loaded": row.loaded} if row.loaded else {})
