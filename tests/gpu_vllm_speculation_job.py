"""Speculation in vLLM on two GPUs: bytes against decoding without it at TP 1 and 2, and tokens a second (docs/benchmarks-verified.md).

python -m tests.gpu_vllm_speculation_job --out DIR [--only plain known ...]     a random Llama of 4 layers with Llama-3-8B's widths

All engines start at once and share the GPUs; one at a time is timed on each. What is found is printed, and OUT/speculation.json written, at
once. Lines in the order of what they show: the bytes, then tokens a second.
"""

import argparse
import concurrent.futures
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time

from tpinv.harness.vllm import drafts, model
from tpinv.harness.vllm.verify import run_job

VOCABULARY = model.LARGE.vocabulary
SHARES = (0.0, 0.1, 0.5, 1.0)
MODEL = "/tmp/tpinv-vllm-model"
WORKER = "tpinv.integrations.vllm.self_draft.Worker"
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
KNOWN = {"method": "custom_class", "model": "tpinv.harness.vllm.drafts.KnownAnswers", "num_speculative_tokens": 7}
OWN = {"method": "draft_model", "model": MODEL, "num_speculative_tokens": 4, "quantization": "fp8"}
SELF = {"method": "custom_class", "model": "tpinv.integrations.vllm.self_draft.SelfDraft", "num_speculative_tokens": 7}
SELF_FP8 = SELF | {"model": "tpinv.integrations.vllm.self_draft.SelfDraftFp8"}
SPOILED = SELF | {"model": "tpinv.harness.vllm.self_drafts.Spoiled"}
# name -> (layers, first GPU, TP, speculative_config, what is timed beside decoding as it is, or None for nothing)
ENGINES = {
    "plain": ("tpinv", 0, 1, None, {}),
    "stock": ("stock", 1, 1, None, {}),
    "known": ("tpinv", 0, 1, KNOWN, {"shares": SHARES}),
    "known-2": ("tpinv", 0, 2, KNOWN, None),
    "self-fp8": ("tpinv", 1, 1, SELF_FP8, {"deterministic": SHARES}),
    "self": ("tpinv", 0, 1, SELF, {"deterministic": SHARES}),
    "spoiled-2": ("tpinv", 0, 2, SPOILED, None),
    "stock-ngram": ("stock", 1, 1, NGRAM, None),
    "ngram": ("tpinv", 1, 1, NGRAM, {}),
    "fp8-draft": ("tpinv", 1, 1, OWN, {}),
}
COMPARED = {"tpinv": "plain", "stock": "stock"}  # with what an engine's answers are: its own layers without speculation


class Run:
    def __init__(self, arguments):
        self.arguments, self.started, self.lock, self.results = arguments, time.time(), threading.Lock(), {}

    def left(self) -> float:
        return self.arguments.deadline - (time.time() - self.started)

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.started:5.0f} s] {text}", flush=True)

    def keep(self, name: str, result: dict) -> None:
        with self.lock:
            self.results[name] = result
            with open(os.path.join(self.arguments.out, "speculation.json"), "w", encoding="utf-8") as file:
                json.dump(self.results, file)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=140.0, help="seconds after which every engine is ended")
    parser.add_argument("--bytes", action="store_true", help="time nothing, so that the GPUs may be shared")
    run = Run(parser.parse_args())
    if not os.path.exists(os.path.join(MODEL, "config.json")):
        code = "import sys, torch; from tpinv.harness.vllm import model; model.write(sys.argv[1], model.LARGE, torch.bfloat16, 'cuda')"
        subprocess.run([sys.executable, "-c", code, MODEL], check=True)
    run.say("model written")
    names = [name for name in ENGINES if name in run.arguments.only and ENGINES[name][2] <= run.arguments.gpus]
    with tempfile.TemporaryDirectory(prefix="tpinv-vllm-") as directory, concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        futures = []
        for name in names:
            futures.append(pool.submit(engine, run, name, directory))
            time.sleep(1.5)  # all look for free ports
        tell_answers(run, directory)
        concurrent.futures.wait(futures)
    for name, result in run.results.items():
        run.say(f"{name}: {result['start']:.0f} s to start; {result['counts']}; {differing(name, run.results)}")
    for name, result in run.results.items():
        for batch, rates in result.get("speed", {}).items():
            run.say(f"{name}: {batch}: " + ", ".join(f"{what} {rate:.0f}" for what, rate in rates.items()))
    run.say("done")


def engine(run: Run, name: str, directory: str) -> None:
    path = os.path.join(directory, name)
    try:
        result = run_job(job(run, name, directory), path, max(run.left(), 1.0))
    except Exception as error:  # the others have answers to give
        run.say(f"{name}: FAILED: {type(error).__name__}: {str(error)[-1500:]}")
        if not os.path.exists(f"{path}.out.answers"):
            return
        with open(f"{path}.out.answers", encoding="utf-8") as file:
            result = json.load(file)
    run.keep(name, result)
    run.say(f"{name}: {result['counts']}; {differing(name, run.results)}; {result.get('speed')}")


def tell_answers(run: Run, directory: str) -> None:
    """Gives the plain engine's answers to the engines that draft from them."""
    path = os.path.join(directory, "plain.out.answers")
    while run.left() > 0 and not os.path.exists(path):
        time.sleep(0.2)
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        answers = json.load(file)["answers"]
    told = [(request["prompt"], answers[request["name"]]["tokens"], SHARES[i % 4]) for i, request in enumerate(requests(1))]
    for name in ("known", "known-2"):
        drafts.write(os.path.join(directory, f"{name}.drafts"), told, VOCABULARY)
        with open(os.path.join(directory, f"{name}.ready"), "w", encoding="utf-8"):
            pass


def requests(apart: int) -> list[dict]:
    draw = random.Random(5)
    tokens = lambda n: [draw.randrange(3, VOCABULARY) for _ in range(n)]  # noqa: E731
    sampling = [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "seed": 4, "top_k": 50, "top_p": 0.9},
                {"temperature": 0, "repetition_penalty": 1.2}]  # fmt: skip
    prefix, found = tokens(300), []
    for i, given in enumerate(sampling * 6):
        prompt = (prefix if i % 3 == 0 else []) + tokens(draw.randint(1, 600))
        found.append({"name": f"r{i}", "prompt": prompt, "sampling": {"max_tokens": 48, "ignore_eos": True} | given, "step": i * apart})
    return found


def job(run: Run, name: str, directory: str) -> dict:
    layers, first, tp, speculative, timed = ENGINES[name]
    gpus = [(first + rank) % run.arguments.gpus for rank in range(tp)]
    width = speculative["num_speculative_tokens"] + 1 if speculative else 1
    arguments = {
        "compilation_config": {"cudagraph_capture_sizes": sorted({1, 2, 4, 8, 16, 32, 64} | {width * n for n in (1, 2, 4, 8, 16, 32, 64)})},
        "kv_cache_memory_bytes": 3 << 30,
    }
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "VLLM_USE_V2_MODEL_RUNNER": "0"}  # one runner: one noise
    speed = {"vocabulary": VOCABULARY, "prompt": 64, "answer": 129, "batches": [1, 8, 64]} | (timed or {})
    given = {}
    asked = requests(1 if speculative else 10**6)
    if speculative:
        arguments |= {"speculative_config": speculative, "async_scheduling": False}
    if speculative is KNOWN:
        path = os.path.join(directory, f"{name}.drafts")
        environment |= drafts.write(path, [], VOCABULARY)
        speed["drafts_at"], given["wait_for"] = path, os.path.join(directory, f"{name}.ready")
    if speculative in (SELF, SELF_FP8, SPOILED):
        arguments["worker_cls"] = WORKER
        environment["TPINV_SELF_DRAFTS"] = json.dumps({"vocabulary": VOCABULARY, "shares": SHARES})
        if speculative is not SPOILED:  # every fourth greedy request takes drafts as they are, between the others
            for request in asked[::8]:
                request["sampling"] |= {"extra_args": {"deterministic": False}, "logprobs": None}
    plan = {
        "name": name,
        "waves": [],
        "budget": 2048 if speculative else 4096,
        "sequences": 64,
        "prefix_cache": bool(speculative),
        "blocks": 0,
    }
    return {
        "module": "speculate", "layers": layers, "leaves": 8, "device": "cuda", "model": MODEL, "dtype": "bfloat16", "eager": name == "spoiled-2", "block": 32,
        "longest": 2048, "tp": tp, "memory": 0.1, "plan": plan, "kv": layers == "tpinv", "asked": asked, "arguments": arguments,
        "environment": environment, "locks": [os.path.join(directory, f"gpu-{gpu}") for gpu in gpus], "until": run.started + run.arguments.deadline - 12,
    } | given | ({"speed": speed} if timed is not None and not run.arguments.bytes else {})  # fmt: skip


def differing(name: str, results: dict[str, dict]) -> str:
    """Of requests that keep the guarantee."""
    reference = COMPARED[ENGINES[name][0]]
    if name == reference or reference not in results:
        return "nothing to compare with"
    expected, found = results[reference]["answers"], results[name]["answers"]
    kept = [r for r in expected if found[r].keys() >= {"log_probs"}]
    texts = ", ".join(
        f"{what}: {sum(expected[r][what] != found[r][what] for r in kept)} of {len(kept)} differ"
        for what in ("tokens", "log_probs", "candidates", "kv")
        if what in expected[kept[0]]
    )
    waived = [r for r in expected if r not in kept]
    return texts + (
        f"; waived: tokens of {sum(expected[r]['tokens'] != found[r]['tokens'] for r in waived)} of {len(waived)}" if waived else ""
    )


if __name__ == "__main__":
    main()
    sys.exit(0)
