"""``tpinv audit answers.jsonl --model PATH --tp N``: are these log-probabilities what this model gives for these tokens?

Whoever holds the weights can answer, in another framework, at another tensor-parallel size: equal to the last byte, or the first token
that is not. A transcript is written by tpinv.inference.transcript (docs/rl.md); it names its order of additions, which the audit takes
over, and is refused where this version has another one.
"""

import argparse
import importlib.util
import os

import torch
from rich.console import Console

from tpinv.harness.outputs import check_outputs, write_json
from tpinv.inference import transcript

FRAMEWORKS = {"transformers": "transformers", "megatron": "megatron.core", "torchtitan": "torchtitan"}
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("transcript", help="the answers, one JSON object a line")
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="the checkpoint's directory, Llama or Qwen 3, as transformers writes it"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel size of the audit (default 1)")
    parser.add_argument("--sequence-parallel", action="store_true", help="between the ranks of the audit")
    parser.add_argument(
        "--framework", choices=FRAMEWORKS, help="that computes (default: transformers, which has whole models, or megatron at N > 1)"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds, for all answers (default 600)")
    parser.add_argument("--json", metavar="PATH", help="write the differences as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0 if every log-probability has the transcript's bytes, 1 if one has not. ValueError for what cannot be audited."""
    check_outputs(arguments)
    answers = transcript.read(arguments.transcript)
    framework, tree, dtype = _check(arguments, answers)
    from tpinv.harness import across
    from tpinv.testing import RankPool

    differing, first, variant = 0, None, "SP" if arguments.sequence_parallel else ""
    with RankPool() as pool:
        for temperature in sorted({answer.temperature for answer in answers}):
            numbers = [i for i, answer in enumerate(answers) if answer.temperature == temperature]
            rows = [answers[i].tokens for i in numbers]
            device = answers[0].device
            length = -(-max(map(len, rows)) // arguments.tp) * arguments.tp
            task = across.Task(arguments.model, "tpinv", dtype, tree.leaves, length=length, node_dtype=tree.node_dtype, device=device)
            job = across.score_rows, arguments.tp, framework, task, rows, temperature, variant
            scored = pool.run(*job, timeout=arguments.timeout, device=device)[0]
            for i, log_probs in zip(numbers, scored, strict=True):
                for at, found in enumerate(log_probs[answers[i].first - 1 :].tolist()):
                    if transcript.to_hex(found) != answers[i].log_probs[at]:
                        differing += 1
                        first = min(first or (i, at, found), (i, at, found))
    tokens = sum(len(answer.log_probs) for answer in answers)
    where = f"{framework}, TP = {arguments.tp}{', SP' * bool(variant)}, {tree.fingerprint}"
    told = f"{len(answers)} answers, {tokens} tokens: {f'{differing} differ' if differing else 'all equal'} ({where})"
    console = Console(highlight=False, soft_wrap=True)
    console.print(told)
    if first:
        i, at, found = first
        given = answers[i].log_probs[at]
        place = f"answer {i + 1}, token {answers[i].first + at} (number {answers[i].tokens[answers[i].first + at]})"
        console.print(
            f"the first is {place}: the transcript says {transcript.to_float(given)!r} ({given}), this model gives {found!r} ({transcript.to_hex(found)})",
            markup=False,
        )
    if arguments.json:
        place = {"answer": first[0], "token": answers[first[0]].first + first[1]} if first else None
        write_json(arguments.json, {"answers": len(answers), "tokens": tokens, "differing": differing, "first": place, "by": where})
    return int(bool(differing))


def _check(arguments: argparse.Namespace, answers: list[transcript.Answer]) -> tuple:
    """Framework, tree and dtype of the audit. ValueError for one that cannot be, or whose result would mean nothing."""
    framework = arguments.framework or ("transformers" if arguments.tp == 1 else "megatron")
    if arguments.tp < 1:
        raise ValueError(f"--tp {arguments.tp} must be at least 1")
    if framework == "transformers" and arguments.tp > 1:
        raise ValueError(f"--framework transformers has whole models, for --tp 1; --tp {arguments.tp} needs megatron or torchtitan")
    if arguments.sequence_parallel and arguments.tp == 1:
        raise ValueError("--sequence-parallel shards the sequence over ranks, of which --tp 1 has none; use --tp 2 or more")
    parts = FRAMEWORKS[framework].split(".")
    if any(importlib.util.find_spec(".".join(parts[: i + 1])) is None for i in range(len(parts))):
        raise ValueError(f"--framework {framework}: {FRAMEWORKS[framework]} is not installed; pip install 'tpinv[{framework}]'")
    for name in ("fingerprint", "dtype", "device"):
        if len(found := {getattr(answer, name) for answer in answers}) > 1:
            raise ValueError(f"the answers have several values of {name}: {sorted(found)}; audit them one file each")
    tree = transcript.tree_of(answers[0].fingerprint)
    if tree.leaves % arguments.tp:
        raise ValueError(f"--tp {arguments.tp} does not divide the transcript's leaves={tree.leaves}")
    if framework == "torchtitan" and tree.node_dtype != "float32":
        raise ValueError(f"node_dtype={tree.node_dtype} is not audited with torchtitan; use megatron")
    if answers[0].device == "cuda" and not torch.cuda.is_available():
        raise ValueError("the answers were computed on a GPU, whose bytes a CPU has not: audit them on one (ranks may share it)")
    if answers[0].dtype not in DTYPES:
        raise ValueError(f"dtype={answers[0].dtype} is not audited; covered are {', '.join(DTYPES)}")
    config_path = os.path.join(arguments.model, "config.json")
    if not os.path.exists(config_path):
        raise ValueError(f"--model {arguments.model} is no checkpoint directory: it holds no config.json")
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(arguments.model).vocab_size
    for i, answer in enumerate(answers):
        if max(answer.tokens) >= vocabulary:
            raise ValueError(
                f"answer {i + 1} has token {max(answer.tokens)}, past this model's vocabulary of {vocabulary}; is it another model?"
            )
    torch.set_num_threads(1)
    return framework, tree, DTYPES[answers[0].dtype]
