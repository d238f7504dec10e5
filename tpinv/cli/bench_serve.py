"""``tpinv bench serve``: the options; what runs is tpinv/harness/vllm/bench.py."""

import argparse

from tpinv.harness.vllm import KINDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="DIRECTORY",
        help="serve: the model (default: a random one of 2 layers; llama3-8b: all of that model's layers, with dummy weights)",
    )
    parser.add_argument("--engines", nargs="+", choices=KINDS, help="serve: which to time (default: all that run here), stock first")
    parser.add_argument(
        "--gpus",
        nargs="+",
        metavar="GPUS",
        help="serve: those of each engine, such as 0 0 1 or 0,1 0,1: all start at once, and are timed in turns",
    )
    parser.add_argument("--logs", metavar="DIRECTORY", help="serve: where the engines' output is kept")
    parser.add_argument("--prompt", type=int, default=1024, help="serve: tokens of a prompt (default 1024)")
    parser.add_argument("--answer", type=int, default=256, help="serve: tokens of an answer (default 256)")
    parser.add_argument("--requests", type=int, default=64, help="serve: requests at once (default 64)")


def run(arguments: argparse.Namespace) -> int:
    from tpinv.harness.vllm import bench

    return bench.run(arguments)
