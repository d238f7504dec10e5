"""One engine, one plan: runs in a process of its own, because vLLM holds on to devices, environment and plugins.

python -m tpinv.harness.vllm.serve_plan JOB.json RESULT.json
"""

import contextlib
import fcntl
import json
import os
import random
import struct
import sys
import time

from tpinv.harness.vllm import cache, completions
from tpinv.harness.vllm.schedule import Plan, Request


def main(job_path: str, result_path: str) -> None:
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    os.environ.update(_environment(job))
    requests = [Request(**{**request, "prompt": tuple(request["prompt"])}) for request in job["requests"]]
    started = time.monotonic()
    llm = _engine(job, Plan(**job["plan"]))
    seconds = time.monotonic() - started
    if job["layers"] == "tpinv":
        from tpinv.integrations.vllm import assert_active

        reports = assert_active(llm)
    else:
        reports = []
    result = {"reports": reports, "start": seconds}
    with _turn(job["turn"]) if "turn" in job else contextlib.nullcontext():
        for name, stage in _stages(llm, job, requests).items():
            started = time.monotonic()
            result |= stage(result)
            result["seconds"] = result.get("seconds", 0.0) + time.monotonic() - started
            _write(f"{result_path}.part", result)
            print(f"{name}: done after {result['seconds']:.0f} s", flush=True)
    if job["layers"] == "tpinv" and job.get("kv_heads"):
        result["collectives"] = llm.collective_rpc("describe_collectives")
    _write(result_path, result)


def _stages(llm, job: dict, requests: list[Request]) -> dict:
    """What a job asks for, by name: functions of what was found so far that return more of it."""
    finished = cache.Finished(llm, job["kv_heads"]) if job.get("kv_heads") else None
    stages = {}
    if requests:
        stages["plan"] = lambda found: dict(zip(("answers", "counts"), serve(llm, requests, Plan(**job["plan"]), finished), strict=True))
    if job.get("again"):
        stages["scored"] = lambda found: {"answers": found["answers"] | score(llm, requests, found["answers"], finished)}
        if job["layers"] == "tpinv":
            stages["reloaded"] = lambda found: {"answers": found["answers"] | reload(llm, requests, finished)}
    for size in job.get("batches", {}).get("sizes", ()):
        stages[f"batches of {size}"] = lambda found, size=size: {
            "batches": found.get("batches", {}) | {str(size): batches(llm, job["batches"], size, finished)}
        }
    if "completions" in job:
        stages["completions"] = lambda found: {"completions": complete(llm, job["completions"])}
    if "speed" in job:
        stages["speed"] = lambda found: {"speed": speed(llm, **job["speed"])}
    return stages


def _write(path: str, result: dict) -> None:
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.replace(f"{path}.new", path)


def _environment(job: dict) -> dict[str, str]:
    chosen = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that a request arrives at the step that the plan names
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "TPINV_VLLM": json.dumps({"leaves": job["leaves"]}) if job["layers"] == "tpinv" else "",
        "VLLM_BATCH_INVARIANT": "1" if job["layers"] == "batch-invariant" else "0",
    }
    if job["device"] == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        bound = "|".join(str(cores[(job.get("first_core", 0) + rank) % len(cores)]) for rank in range(job["tp"]))
        chosen |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": bound, "VLLM_CPU_CI_ENV": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        chosen["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    return chosen | job.get("environment", {})


def _engine(job: dict, plan: Plan):
    from vllm import LLM

    more = {"num_gpu_blocks_override": plan.blocks} if plan.blocks else {}
    if job.get("kv_heads"):
        more["worker_extension_cls"] = cache.EXTENSION
    return LLM(
        job["model"],
        tensor_parallel_size=job["tp"],
        dtype=job["dtype"],
        enforce_eager=job["eager"],
        max_model_len=job["longest"],
        max_num_seqs=plan.sequences,
        max_num_batched_tokens=plan.budget,
        enable_chunked_prefill=True,
        enable_prefix_caching=plan.prefix_cache,
        block_size=job["block"],
        gpu_memory_utilization=job.get("memory", 0.3),
        distributed_executor_backend="mp" if job["tp"] > 1 else None,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        max_logprobs=5,
        seed=0,
        **more,
        **job.get("arguments", {}),
    )


def serve(llm, requests: list[Request], plan: Plan, finished: cache.Finished | None = None) -> tuple[dict, dict]:
    """The answers by request name, those of later waves with the wave's number behind it, and what happened."""
    answers, counts = {}, {"steps": 0, "preemptions": 0, "cached": 0}
    for number, wave in enumerate(plan.waves or [()]):
        for name, answer in _serve_wave(llm, requests, wave, counts, finished).items():
            answers[f"{name} wave {number}" if number else name] = answer
    return answers, counts


def _serve_wave(llm, requests: list[Request], wave: tuple, counts: dict, finished=None, lengths: dict[str, int] | None = None) -> dict:
    """``wave`` empty: one request after the other. ``lengths``: positions whose keys and values are read, if not all that there are."""
    engine, answers, preempted, step = llm.llm_engine, {}, {}, 0
    by_name = {request.name: request for request in requests}
    waiting = [*wave] or [(request.name, -1) for request in requests]
    scheduler = getattr(getattr(engine.engine_core, "engine_core", None), "scheduler", None)
    while waiting or engine.has_unfinished_requests():
        while waiting and (waiting[0][1] <= step if wave else not engine.has_unfinished_requests()):
            request = by_name[waiting.pop(0)[0]]
            engine.add_request(request.name, {"prompt_token_ids": list(request.prompt)}, _sampling(request))
        for output in engine.step():
            if output.finished:
                name = output.request_id
                answers[name] = _answer(output)
                counts["cached"] += output.num_cached_tokens or 0
                if finished is not None:  # the last token is not computed any more
                    length = len(by_name[name].prompt) + len(answers[name]["tokens"]) - 1
                    answers[name]["kv"] = finished.take(name, (lengths or {}).get(name, length))
        for name, state in getattr(scheduler, "requests", {}).items():
            preempted[name] = state.num_preemptions
        step += 1
    counts["steps"] += step
    counts["preemptions"] += sum(preempted.values())
    return answers


def score(llm, requests: list[Request], answers: dict, finished: cache.Finished | None = None) -> dict:
    """Prompt and answer as one prompt: the log-probabilities of the answer's tokens as a prefill gives them, and the keys and values that
    decoding had, name + " scored"."""
    prompts = [replace_prompt(request, answers[request.name]["tokens"]) for request in requests]
    lengths = {request.name: len(request.prompt) - 1 for request in prompts}
    found = {}
    for request, (name, answer) in zip(requests, _serve_wave(llm, prompts, (), _nothing(), finished, lengths).items(), strict=True):
        kv = {"kv": answer["kv"]} if finished is not None else {}
        found[f"{name} scored"] = {"log_probs": answer["prompt_log_probs"][len(request.prompt) - 1 :]} | kv
    return found


def replace_prompt(request: Request, answer: list[int]) -> Request:
    """``request`` and its answer as a prompt, for one greedy token and the log-probabilities of the prompt."""
    return Request(request.name, (*request.prompt, *answer), 1, prompt_log_probs=True)


def _nothing() -> dict[str, int]:
    return {"steps": 0, "preemptions": 0, "cached": 0}


def reload(llm, requests: list[Request], finished: cache.Finished | None = None) -> dict:
    """The first requests' answers after the weights were loaded once more, name + " reloaded"."""
    llm.collective_rpc("reload_weights")
    answers, _ = serve(llm, requests[:3], Plan("reloaded", (), 0, 0, False, 0), finished)
    return {f"{name} reloaded": answer for name, answer in answers.items()}


def batches(llm, settings: dict, size: int, finished: cache.Finished | None = None) -> dict[str, dict]:
    """Greedy answers to ``count`` random prompts, ``size`` at a time: name -> answer. Batches of one answer the first eight alone."""
    draw = random.Random(1)
    requests = [
        Request(
            f"b{i}", tuple(draw.randrange(3, settings["vocabulary"]) for _ in range(draw.choice(settings["lengths"]))), settings["tokens"]
        )
        for i in range(settings["count"])
    ]
    asked = requests[:8] if size == 1 else requests
    llm.reset_prefix_cache()
    found = {}
    for i in range(0, len(asked), size):
        found |= _serve_wave(llm, asked[i : i + size], tuple((r.name, -1) for r in asked[i : i + size]), _nothing(), finished)
    return found


def complete(llm, settings: dict) -> dict:
    """completions.py's, of this engine."""
    rounds = completions.make_rounds(**settings)
    answers = {}
    for batch in rounds:
        answers |= _serve_wave(llm, batch, tuple((request.name, -1) for request in batch), _nothing())
    return completions.summary(rounds, answers)


def speed(llm, vocabulary: int, prompt: int, answer: int, requests: int, turns: dict | None = None) -> dict[str, float]:
    """Tokens a second of ``requests`` at once, seconds until all of them have their first token, and milliseconds a token of one alone; the
    better of two rounds, prompts never repeated."""
    from vllm import SamplingParams

    draw = random.Random(2)
    best: dict[str, float] = {}
    for number, turn in enumerate(_turns(**turns) if turns else [contextlib.nullcontext()] * 3):
        with turn:
            for name, count, tokens in (("throughput", requests, answer), ("prefill", requests, 1), ("alone", 1, answer)):
                tokens = tokens if number else min(tokens, 24)  # the first round warms up
                greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
                prompts = [{"prompt_token_ids": [draw.randrange(3, vocabulary) for _ in range(prompt)]} for _ in range(count)]
                started = time.monotonic()
                llm.generate(prompts, greedy, use_tqdm=False)
                seconds = time.monotonic() - started
                if number:
                    best[name] = min(best.get(name, seconds), seconds)
                print(f"round {number}, {name}: {seconds:.3f} s", flush=True)
    return {
        "tokens_per_second": requests * answer / best["throughput"],
        "prefill_seconds": best["prefill"],
        "milliseconds_per_token": 1e3 * best["alone"] / answer,
    }


def _turns(directory: str, name: str, names: list[str], patience: float):
    """Three turns of an engine beside others on the same GPUs: none computes while another is timed, and none is timed before all have
    started, or failed, or ``patience`` seconds have passed. Whoever ends an engine that failed leaves its file here too."""
    open(os.path.join(directory, name), "w").close()
    until = time.monotonic() + patience
    while missing := [other for other in names if not os.path.exists(os.path.join(directory, other))]:
        if time.monotonic() > until:
            print(f"{missing} start while this engine is timed", flush=True)
            break
        time.sleep(0.05)
    for _ in range(3):
        yield _turn(os.path.join(directory, "turn"))
        time.sleep(0.2)  # the others wait for the lock, and it is nobody's by right


@contextlib.contextmanager
def _turn(path: str):
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the process ends, however it ends
        yield


def _sampling(request: Request):
    from vllm import SamplingParams

    return SamplingParams(
        temperature=request.temperature,
        seed=request.seed,
        top_k=request.top_k,
        top_p=request.top_p,
        max_tokens=request.tokens,
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=0 if request.prompt_log_probs else None,
        detokenize=False,
    )


def _answer(output) -> dict:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    prompt = output.prompt_logprobs or []
    return {
        "tokens": tokens,
        "log_probs": [_bytes(row[token].logprob) for row, token in zip(completion.logprobs, tokens, strict=True)],
        "candidates": [sorted((token, _bytes(entry.logprob)) for token, entry in row.items()) for row in completion.logprobs],
        "prompt_log_probs": [_bytes(next(iter(row.values())).logprob) for row in prompt if row],
    }


def _bytes(value: float) -> str:
    """A float32, which Python holds as a float64, as its bytes."""
    return struct.pack("<f", value).hex()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # vLLM's processes may end in "terminate called without an active exception" after all is done
