"""``tpinv doctor``: which kernels this machine can use, whether their bits agree, and what the tuner has chosen.

Every candidate configuration is compared with the canonical one, on hostile inputs, for each kind of product and dtype. Exit
status 1 when one disagrees: then it is never used here, and if all do the canonical kernel runs, slower. ``--vllm`` instead says whether
vLLM would run on tpinv here, with status 2 if it would not.
"""

import argparse
import os

import torch
from rich.console import Console
from rich.table import Table

from tpinv.tree import ReductionTree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--leaves", nargs="+", type=int, default=[1, 8], help="leaves of the trees to check (default 1 8)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 1024], help="numbers of tokens whose candidates to check")
    parser.add_argument("--choices", action="store_true", help="also list what the tuner has chosen, shape by shape")
    parser.add_argument("--vllm", action="store_true", help="say whether vLLM would run on tpinv here, instead")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False)
    if arguments.vllm:
        from tpinv.integrations.vllm import doctor

        if doctor.run(console):
            raise ValueError("vLLM would not run on tpinv here; what is wrong is listed above")
        return 0
    for leaves in arguments.leaves:
        ReductionTree(leaves)
    if min(arguments.tokens) < 1:
        raise ValueError(f"--tokens {' '.join(map(str, arguments.tokens))} must be at least 1")
    from tpinv import kernels

    console.print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, TPINV_CACHE {os.environ.get('TPINV_CACHE', 'not set')}")
    if not torch.cuda.is_available():
        console.print("no GPU: tpinv runs its reference in plain torch, with the same contract")
        return 0
    reason = kernels.unavailable(torch.empty(0, device="cuda"))
    if reason:
        console.print(f"{torch.cuda.get_device_name()}: no kernels here, because {reason}; tpinv runs its reference")
        return 0

    from tpinv.collectives import symmetric
    from tpinv.kernels.gemm import sm90, tuner, verification
    from tpinv.runtime import cuda

    console.print(f"{torch.cuda.get_device_name()}, cache {cuda.cache_dir()}")
    if cuda.missing(sm90.SOURCE):
        console.print(f"csrc/{sm90.SOURCE}: {cuda.missing(sm90.SOURCE)}; Triton runs in its place, slower")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    decision = symmetric.decide([symmetric.facts(device) for device in devices])
    console.print(f"collectives of {len(devices)} ranks, a GPU each: {decision.backend or 'ProcessGroup'}, because {decision.reason}")
    table = Table("product", "dtype", "leaves", "tokens", "kernels", "agree", "struck off", title="bits against the canonical kernel")
    bad = 0
    for product, dtype, precision in _KINDS:
        for leaves in arguments.leaves if product != "wgrad" else [1]:
            for tokens in arguments.tokens:
                problem = _problem(product, dtype, precision, leaves, tokens)
                verdicts = {config: verification.verify(problem, config) for config in tuner.candidates(problem)}
                wrong = [config.name for config, good in verdicts.items() if not good]
                bad += len(wrong)
                name = f"{dtype}".removeprefix("torch.") + (f" {precision}" if dtype == torch.float32 else "")
                families = ", ".join(sorted({config.name.split("-")[0] for config in verdicts}))
                agree = f"{len(verdicts) - len(wrong)} of {len(verdicts)}"
                table.add_row(product, name, str(leaves), str(tokens), families, agree, ", ".join(wrong) or "none")
    console.print(table)
    if arguments.choices:
        for shape, row in tuner.table(torch.cuda.current_device()).items():
            console.print(f"{row['config']:28} {row['microseconds']:>10} us  of {row['candidates']:2} for {shape}")
    console.print("all configurations agree" if not bad else f"{bad} configurations disagree and will not be used")
    return int(bad > 0)


_KINDS = (
    ("forward", torch.bfloat16, "ieee"),
    ("dgrad", torch.bfloat16, "ieee"),
    ("wgrad", torch.bfloat16, "ieee"),
    ("forward", torch.float16, "ieee"),
    ("forward", torch.float32, "ieee"),
    ("forward", torch.float32, "tf32"),
)


def _problem(product: str, dtype: torch.dtype, precision: str, leaves: int, tokens: int):
    from tpinv.kernels.gemm.problem import make_problems

    make = lambda *shape: torch.zeros(*shape, device="cuda", dtype=dtype)  # noqa: E731  the verifier brings its own values
    k = 64 * leaves
    a, b = {
        "forward": lambda: (make(tokens, k), make(512, k)),
        "dgrad": lambda: (make(tokens, k), make(k, 512).t()),
        "wgrad": lambda: (make(k, tokens).t(), make(k, 512).t()),
    }[product]()
    return make_problems(a, b, make(1, tokens, 512), None, ReductionTree(leaves), 0, 1, 1, precision)[0]
