"""vLLM on GPUs, outside pytest: engines take a minute to start, so that one run on a machine with two GPUs answers all questions.

    python -m tests.gpu_vllm_job [--out DIRECTORY] [--only PHASE ...]

A random Llama of 4 layers with Llama-3-8B's widths, 64 greedy requests of 17 to 513 tokens, 96 tokens each, in batches of 1, 8 and 64;
requests that arrive at random with chunked prefill, cached prefixes and preemption; throughput and latency. Engines of one GPU run two
at a time. Every line is printed, and OUT/results.json written, as soon as it is known: a run may be cut off.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict

from tpinv.harness.vllm import model, schedule
from tpinv.harness.vllm.verify import run_job

# phase -> engines of it: (layers, tp, eager). The engines of a phase run at once, on GPUs of their own.
PHASES = {
    "tpinv": [("tpinv", 1, False), ("tpinv", 1, True)],
    "tpinv 2": [("tpinv", 2, False)],
    "stock": [("stock", 1, False), ("batch-invariant", 1, False)],
    "stock 2": [("stock", 2, False)],
    "batch-invariant 2": [("batch-invariant", 2, False)],
    "tpinv 2 eager": [("tpinv", 2, True)],
}
BATCHES = {"sizes": [1, 8, 64], "vocabulary": model.LARGE.vocabulary, "lengths": [17, 64, 200, 513], "count": 64, "tokens": 96}
SPEED = {"vocabulary": model.LARGE.vocabulary, "prompt": 1024, "answer": 256, "requests": 64}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--leaves", type=int, default=8)
    parser.add_argument("--deadline", type=float, default=530.0, help="seconds after which no phase starts")
    parser.add_argument("--model", default="/tmp/tpinv-vllm-model", help="made if it is not there")
    arguments = parser.parse_args()
    started = time.monotonic()
    if not os.path.exists(os.path.join(arguments.model, "config.json")):
        code = "import sys, torch; from tpinv.harness.vllm import model; model.write(sys.argv[1], model.LARGE, torch.bfloat16, 'cuda')"
        subprocess.run([sys.executable, "-c", code, arguments.model], check=True)  # whose memory on the GPU is free afterwards
    say(started, f"model in {arguments.model}")
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="tpinv-vllm-") as directory:
        for phase in arguments.only:
            if time.monotonic() - started > arguments.deadline - 60:
                say(started, f"{phase}: no time left")
                continue
            engines, first = [], 0
            for layers, tp, eager in PHASES[phase]:
                engines.append((layers, tp, eager, range(first, first + tp)))
                first += tp
            left = arguments.deadline - (time.monotonic() - started)
            with concurrent.futures.ThreadPoolExecutor(len(engines)) as pool:
                runs = {pool.submit(engine, *e, arguments, directory, left): e[:3] for e in engines}
                for done in concurrent.futures.as_completed(runs):
                    name = "{} TP={} {}".format(runs[done][0], runs[done][1], "eager" if runs[done][2] else "graphs")
                    if done.exception() is not None:
                        say(started, f"{name}: FAILED\n{str(done.exception())[-3500:]}")
                        continue
                    results[name] = done.result()
                    report(started, name, results)
                    with open(os.path.join(arguments.out, "results.json"), "w", encoding="utf-8") as file:
                        json.dump(results, file)
    say(started, "done")


def engine(layers: str, tp: int, eager: bool, gpus: range, arguments, directory: str, timeout: float) -> dict:
    requests = schedule.make_requests(1, 16, model.LARGE.vocabulary, 600)
    plan = schedule.crowded(1 + tp + eager, requests, 32)
    longest = SPEED["prompt"] + SPEED["answer"] + 32
    blocks = max(plan.blocks, 64 * (longest // 32 + 1))  # the batches and the timing need room; preemption is provoked on CPUs
    job = {
        "layers": layers, "tp": tp, "leaves": arguments.leaves, "device": "cuda", "model": arguments.model, "dtype": "bfloat16", "eager": eager,
        "block": 32, "longest": longest, "memory": 0.6, "plan": plan.as_dict() | {"budget": 2048, "sequences": 64, "blocks": blocks},
        "requests": [asdict(request) for request in requests], "batches": BATCHES, "speed": SPEED, "arguments": {} if eager else {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}}, "environment": {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))},
    }  # fmt: skip
    return run_job(job, os.path.join(directory, f"{layers}-{tp}-{eager}"), timeout)


def report(started: float, name: str, results: dict[str, dict]) -> None:
    mine = results[name]
    speed = ", ".join(f"{key} {value:.4g}" for key, value in mine["speed"].items())
    say(started, f"{name}: {mine['start']:.0f} s to start, {speed}; reports {mine['reports'][:1]}")
    for a, b in itertools.combinations(BATCHES["sizes"], 2):
        say(started, f"  batch {a} against {b}: {differing(mine['batches'][str(a)], mine['batches'][str(b)])}")
    for other, theirs in results.items():
        if other != name and other.split()[0] == name.split()[0]:
            for size in BATCHES["sizes"]:
                say(started, f"  batch {size} against {other}: {differing(mine['batches'][str(size)], theirs['batches'][str(size)])}")
            say(started, f"  requests at random against {other}: {differing_answers(mine['answers'], theirs['answers'])}")


def differing(a: list[str], b: list[str]) -> str:
    count = min(len(a), len(b))
    return f"{sum(x != y for x, y in zip(a, b, strict=False))} of {count} requests differ"


def differing_answers(a: dict, b: dict) -> str:
    return f"{sum(a[name] != b[name] for name in a)} of {len(a)} differ"


def say(started: float, text: str) -> None:
    print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)


if __name__ == "__main__":
    main()
    sys.exit(0)
