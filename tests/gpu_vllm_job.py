"""vLLM on two GPUs, outside pytest: an engine takes a minute to start, so that each answers every question in one process.

    python -m tests.gpu_vllm_job [--out DIRECTORY] [--smollm2 DIRECTORY --padded DIRECTORY] [--seconds 470] [--only ENGINE ...] [--short]

    widths     a random Llama of 4 layers with Llama-3-8B's widths        batches    64 greedy requests of 17 to 513 tokens, 64 tokens each,
    qwen3      a random Qwen3 of 2 layers, the same widths, float16                  in batches of 1 (the first 8), 8 and 64
    smollm2    SmolLM2-135M, real weights; padded: with 12 heads          schedule   random arrivals, chunks, cached prefixes, seeds
                                                                          completions    1000 of one prompt at temperature 0 among strangers

Compared: tokens, bytes of log-probabilities, bytes of keys and values. Several lanes of engines at once share the cards, which costs time
and no byte; engines on both cards work in turns, since a rank waits for its peer on a card that others have. ``--short``: every lane is one
engine, 24 tokens an answer, no completions. Every line is printed, and OUT/results.json written, when it is known: a run may be cut off.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict

from tpinv.harness.vllm import schedule
from tpinv.harness.vllm.verify import run_job

# Lanes: GPUs and engines one after the other: model, layers, tp, mode, tokens of a step, blocks of the cache (0: as many as fit), completions
LANES = [
    ("0", [("widths", "tpinv", 1, "graphs", 2048, 0, 1000), ("widths", "stock", 1, "graphs", 2048, 0, 1000)]),
    ("0,1", [("widths", "tpinv", 2, "graphs", 320, 0, 1000), ("padded", "tpinv", 2, "graphs", 512, 0, 1000), ("widths", "batch-invariant", 2, "graphs", 2048, 0, 0)]),
    ("1", [("widths", "tpinv", 1, "eager", 96, 400, 0), ("padded", "stock", 1, "graphs", 2048, 0, 1000)]),
    ("1", [("widths", "batch-invariant", 1, "graphs", 2048, 0, 1000), ("smollm2", "tpinv", 1, "graphs", 2048, 0, 0)]),
    ("0", [("padded", "tpinv", 1, "graphs", 512, 0, 1000)]),
]  # fmt: skip
SHORT = [
    ("0", [("widths", "tpinv", 1, "graphs", 2048, 0, 0)]),
    ("0,1", [("widths", "tpinv", 2, "eager", 320, 64, 0)]),  # 64 blocks: preemption
    ("0,1", [("widths", "tpinv", 2, "graphs", 512, 0, 0)]),
    ("1", [("qwen3", "tpinv", 1, "graphs", 2048, 0, 0)]),
    ("0,1", [("qwen3", "tpinv", 2, "graphs", 320, 64, 0)]),
    ("1", [("widths", "batch-invariant", 1, "graphs", 2048, 0, 0)]),
    ("0,1", [("widths", "batch-invariant", 2, "graphs", 2048, 0, 0)]),
]  # fmt: skip
RANDOM = {  # models that are made: specification, dtype
    "widths": ("model.LARGE", "bfloat16"),
    "qwen3": ("dataclasses.replace(model.LARGE, layers=2, qk_norm=True)", "float16"),
}
SIZES, TOKENS, LONGEST = [1, 8, 64], 64, 1344


class Run:
    """What all lanes share."""

    def __init__(self, arguments):
        self.arguments, self.started, self.lock, self.results = arguments, time.monotonic(), threading.Lock(), {}

    def left(self) -> float:
        return self.arguments.seconds - (time.monotonic() - self.started)

    def say(self, text: str) -> None:
        with self.lock:
            print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def save(self) -> None:
        with self.lock, open(os.path.join(self.arguments.out, "results.json"), "w", encoding="utf-8") as file:
            json.dump(
                {name: {k: v for k, v in found.items() if k not in ("answers", "batches")} for name, found in self.results.items()}, file
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seconds", type=float, default=470.0, help="after which every engine is ended")
    parser.add_argument("--widths", default="/tmp/tpinv-vllm-model", help="made if it is not there")
    parser.add_argument("--qwen3", default="/tmp/tpinv-vllm-qwen3", help="the same")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--smollm2", default="")
    parser.add_argument("--padded", default="")
    run = Run(parser.parse_args())
    lanes = SHORT if run.arguments.short else LANES
    used = {engine[0] for _, engines in lanes for engine in engines}
    makers = [threading.Thread(target=make_model, args=(run, name)) for name in RANDOM if name in used]
    for thread in makers:
        thread.start()
    for thread in makers:
        thread.join()
    with tempfile.TemporaryDirectory(prefix="tpinv-vllm-") as directory:
        threads = [threading.Thread(target=lane, args=(run, gpus, engines, directory)) for gpus, engines in lanes]
        for thread in threads:
            thread.start()
            time.sleep(2)  # the engines of all lanes look for free ports
        for thread in threads:
            thread.join()
    run.say("done")


def make_model(run: Run, name: str) -> None:
    path, (spec, dtype) = getattr(run.arguments, name), RANDOM[name]
    if not os.path.exists(os.path.join(path, "config.json")):
        code = (
            f"import dataclasses, sys, torch; from tpinv.harness.vllm import model; model.write(sys.argv[1], {spec}, torch.{dtype}, 'cuda')"
        )
        subprocess.run([sys.executable, "-c", code, path], check=True)  # whose memory on the GPU is free afterwards
    run.say(f"{name} in {path}")


def lane(run: Run, gpus: str, engines: list[tuple], directory: str) -> None:
    for engine in engines:
        name = "{} {} TP={} {}".format(*engine)
        path = os.path.join(directory, name.replace(" ", "-"))
        if not getattr(run.arguments, engine[0]) or run.arguments.only and name not in run.arguments.only:
            continue
        if run.left() < (40 if run.arguments.short else 90):
            run.say(f"{name}: no time left")
            continue
        try:
            run.say(f"{name}: begins")
            job = make_job(run, gpus, *engine)
            if run.arguments.short and "," in gpus:
                job["turn"] = os.path.join(directory, "turn")
            report(run, name, run_job(job, path, run.left()))
        except Exception as error:  # whatever it is, the other engines have answers to give
            run.say(f"{name}: FAILED\n{''.join(traceback.format_exception_only(error))[-3000:]}")
            if os.path.exists(f"{path}.out.part"):
                with open(f"{path}.out.part", encoding="utf-8") as file:
                    report(run, f"{name} (cut off)", json.load(file))
        if os.path.exists(f"{path}.log"):
            with open(f"{path}.log", encoding="utf-8", errors="replace") as log:
                text = log.read()[-200000:]
            with open(os.path.join(run.arguments.out, f"{os.path.basename(path)}.log"), "w", encoding="utf-8") as log:
                log.write(text)


def make_job(run: Run, gpus: str, which: str, layers: str, tp: int, mode: str, budget: int, blocks: int, completions: int) -> dict:
    path = getattr(run.arguments, which)
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    vocabulary = config["vocab_size"]
    prompt = [(37 * i) % 20000 + 3 for i in range(41)]
    if os.path.exists(os.path.join(path, "prompt.json")):
        with open(os.path.join(path, "prompt.json"), encoding="utf-8") as file:
            prompt = json.load(file)
    requests = schedule.make_requests(1, 16, vocabulary, 600)
    plan = schedule.crowded(budget + tp, requests, 32).as_dict() | {"budget": budget, "sequences": 64, "blocks": blocks}
    more = {} if mode == "eager" else {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}}
    job = {
        "layers": layers, "tp": tp, "leaves": 24 if which == "smollm2" else 8, "device": "cuda", "model": path, "dtype": RANDOM.get(which, ("", "bfloat16"))[1],
        "eager": mode == "eager", "block": 32, "longest": LONGEST, "memory": 0.1, "kv_heads": config["num_key_value_heads"], "plan": plan,
        "requests": [asdict(request) for request in requests], "arguments": {"kv_cache_memory_bytes": 4 << 30} | more,
        "batches": {"sizes": SIZES, "vocabulary": vocabulary, "lengths": [17, 64, 200, 513], "count": 64, "tokens": 24 if run.arguments.short else TOKENS},
        "environment": {"CUDA_VISIBLE_DEVICES": gpus},
    }  # fmt: skip
    if completions:
        tokens = 48 if which == "widths" else 100
        wanted = {"seed": 1, "prompt": prompt, "tokens": tokens, "count": completions, "vocabulary": vocabulary, "longest": 300}
        job["completions"] = wanted
    return job


def report(run: Run, name: str, mine: dict) -> None:
    with run.lock:
        others = [*run.results.items()]
        run.results[name] = mine
    run.say(
        f"{name}: {mine['start']:.0f} s to start, {mine['seconds']:.0f} s; {mine.get('counts')}; {mine['reports'][:1]} {mine.get('collectives')}"
    )
    if found := mine.get("completions"):
        run.say(f"  completions: {found['unique']} unique of {found['count']}, with log-probabilities {found['unique_bytes']}")
    texts = mine.get("batches", {})
    for a, b in itertools.combinations(texts, 2):
        run.say(f"  batch {a} against {b}: {differing(texts[a], texts[b])}")
    kind = name.split(" TP=")[0]
    for other, theirs in others:
        if other.split(" TP=")[0] == kind:
            for size in texts.keys() & theirs.get("batches", {}).keys():
                run.say(f"  batch {size} against {other}: {differing(texts[size], theirs['batches'][size])}")
            if "answers" in mine and "answers" in theirs:
                run.say(f"  random schedule against {other}: {differing(mine['answers'], theirs['answers'])}")
            if "completions" in mine and "completions" in theirs:
                same = mine["completions"]["completions"][0]["tokens"] == theirs["completions"]["completions"][0]["tokens"]
                run.say(f"  most frequent completion of {other}: {'the same' if same else 'ANOTHER'}")
    run.save()


def differing(a: dict[str, dict], b: dict[str, dict]) -> str:
    """Of the requests that both answered."""
    names = [name for name in a if name in b]
    pairs = {
        part: [pair for name in names for pair in zip(a[name][part], b[name][part], strict=False)] for part in ("tokens", "log_probs", "kv")
    }
    pairs |= {"candidates": [(a[name]["candidates"], b[name]["candidates"]) for name in names]}
    pairs |= {"prompts": [(a[name]["prompt_log_probs"], b[name]["prompt_log_probs"]) for name in names]}
    wrong = sum(a[name] != b[name] for name in names)
    parts = ", ".join(f"{part} {sum(x != y for x, y in given)}/{len(given)}" for part, given in pairs.items())
    return f"{wrong} of {len(names)} requests differ ({parts})"


if __name__ == "__main__":
    main()
    sys.exit(0)
