"""Speculation in vLLM on two GPUs: bytes against decoding without it at TP 1 and 2, and tokens a second (docs/benchmarks-vllm.md).

python -m tests.gpu_vllm_speculation_job --out DIR [--only "known" ...]     a random Llama of 4 layers with Llama-3-8B's widths

Phases of one or two engines at once, each on GPUs of its own. What is found is printed, and OUT/speculation.json written, at once.
"""

import argparse
import concurrent.futures
import json
import os
import random
import subprocess
import sys
import tempfile
import time

from tpinv.harness.vllm import drafts, model
from tpinv.harness.vllm.verify import run_job

VOCABULARY = model.LARGE.vocabulary
SHARES = (0.0, 0.1, 0.5, 1.0)
MODEL = "/tmp/tpinv-vllm-model"
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
KNOWN = {"method": "custom_class", "model": "tpinv.harness.vllm.drafts.KnownAnswers", "num_speculative_tokens": 7}
OWN = {"method": "draft_model", "model": MODEL, "num_speculative_tokens": 4}
# name -> (layers, tp, speculative_config, with speeds)
ENGINES = {
    "plain": ("tpinv", 1, None, True),
    "stock": ("stock", 1, None, True),
    "known": ("tpinv", 1, KNOWN, True),
    "fp8-draft": ("tpinv", 1, OWN | {"quantization": "fp8"}, True),
    "ngram": ("tpinv", 1, NGRAM, False),
    "stock-draft": ("tpinv", 1, OWN, True),
    "known-2": ("tpinv", 2, KNOWN, False),
    "ngram-2": ("tpinv", 2, NGRAM, False),
}
PHASES = [("plain", "stock"), ("known", "fp8-draft"), ("known-2",), ("ngram", "stock-draft"), ("ngram-2",)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=290.0, help="seconds after which no phase starts, and none goes on")
    arguments = parser.parse_args()
    started = time.monotonic()
    say = lambda text: print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)  # noqa: E731
    if not os.path.exists(os.path.join(MODEL, "config.json")):
        code = "import sys, torch; from tpinv.harness.vllm import model; model.write(sys.argv[1], model.LARGE, torch.bfloat16, 'cuda')"
        subprocess.run([sys.executable, "-c", code, MODEL], check=True)
    say("model written")
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="tpinv-vllm-") as directory, concurrent.futures.ThreadPoolExecutor(2) as pool:
        for phase in PHASES:
            runs, first = {}, 0
            left = arguments.deadline - (time.monotonic() - started)
            for name in phase:
                tp = ENGINES[name][1]
                if name not in arguments.only or first + tp > arguments.gpus or left < 50:
                    continue
                answers = results.get("plain", {}).get("answers", {})
                runs[pool.submit(run_job, job(name, range(first, first + tp), answers, directory), os.path.join(directory, name), left)] = (
                    name
                )
                first += tp
            for done in concurrent.futures.as_completed(runs):
                name = runs[done]
                if done.exception() is not None:
                    say(f"{name}: FAILED\n{str(done.exception())[-2500:]}")
                    continue
                results[name] = done.result()
                say(
                    f"{name}: {results[name]['start']:.0f} s to start; {results[name]['counts']}; {differing(name, results)}; {results[name].get('speed')}"
                )
                with open(os.path.join(arguments.out, "speculation.json"), "w", encoding="utf-8") as file:
                    json.dump(results, file)
    say("done")


def requests(apart: int) -> list[dict]:
    draw = random.Random(5)
    tokens = lambda n: [draw.randrange(3, VOCABULARY) for _ in range(n)]  # noqa: E731
    sampling = [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "seed": 4, "top_k": 50, "top_p": 0.9},
                {"temperature": 0, "repetition_penalty": 1.2}]  # fmt: skip
    prefix, found = tokens(300), []
    for i, given in enumerate(sampling * 6):
        prompt = (prefix if i % 3 == 0 else []) + tokens(draw.randint(1, 600))
        found.append({"name": f"r{i}", "prompt": prompt, "sampling": {"max_tokens": 64, "ignore_eos": True} | given, "step": i * apart})
    return found


def job(name: str, gpus: range, answers: dict, directory: str) -> dict:
    layers, tp, speculative, timed = ENGINES[name]
    arguments = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}}
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "VLLM_USE_V2_MODEL_RUNNER": "0"}  # one runner: one noise
    speed = {"vocabulary": VOCABULARY, "prompt": 64, "answer": 129, "batches": [1, 8, 64], "drafts_at": None, "shares": []}
    if speculative:
        width = speculative["num_speculative_tokens"] + 1
        arguments["compilation_config"] = {"cudagraph_capture_sizes": sorted({1, 2, 4, *(width * n for n in (1, 2, 4, 8, 16, 32, 64))})}
        arguments |= {"speculative_config": speculative, "async_scheduling": False}
    if speculative is KNOWN:
        path = os.path.join(directory, f"{name}.answers")
        known = [(r["prompt"], answers[r["name"]]["tokens"], SHARES[i % 4]) for i, r in enumerate(requests(1)) if r["name"] in answers]
        environment |= drafts.write(path, known, VOCABULARY)
        speed |= {"drafts_at": path, "shares": [0.0, 0.1, 0.5, 1.0]}
    plan = {
        "name": name,
        "waves": [],
        "budget": 2048 if speculative else 4096,
        "sequences": 64,
        "prefix_cache": bool(speculative),
        "blocks": 1200,
    }
    asked = requests(1 if speculative else 10**6)
    return {
        "module": "speculate", "layers": layers, "leaves": 8, "device": "cuda", "model": MODEL, "dtype": "bfloat16", "eager": False, "block": 32,
        "longest": 2048, "tp": tp, "memory": 0.7, "plan": plan, "kv": layers == "tpinv", "asked": asked if layers == "tpinv" else asked[:1],
        "arguments": arguments, "environment": environment,
    } | ({"speed": speed} if timed else {})  # fmt: skip


def differing(name: str, results: dict[str, dict]) -> str:
    if name in ("plain", "stock") or "plain" not in results:
        return "nothing to compare with"
    expected, found = results["plain"]["answers"], results[name]["answers"]
    return ", ".join(
        f"{what}: {sum(expected[r][what] != found[r][what] for r in expected)} of {len(expected)} differ"
        for what in ("tokens", "log_probs", "candidates", "kv")
    )


if __name__ == "__main__":
    main()
    sys.exit(0)
