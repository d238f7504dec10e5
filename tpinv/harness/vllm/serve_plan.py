"""One engine, one plan: runs in a process of its own, because vLLM holds on to devices, environment and plugins.

python -m tpinv.harness.vllm.serve_plan JOB.json RESULT.json
"""

import json
import os
import random
import struct
import sys
import time

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
    started = time.monotonic()
    answers, counts = serve(llm, requests, Plan(**job["plan"])) if requests else ({}, {})
    if job.get("again"):
        answers |= score(llm, requests, answers)
        answers |= reload(llm, requests) if job["layers"] == "tpinv" else {}
    result = {"answers": answers, "counts": counts, "reports": reports, "start": seconds, "seconds": time.monotonic() - started}
    result |= {"batches": batches(llm, **job["batches"])} if "batches" in job else {}
    result |= {"speed": speed(llm, **job["speed"])} if "speed" in job else {}
    with open(result_path, "w", encoding="utf-8") as file:
        json.dump(result, file)


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

    blocks = {"num_gpu_blocks_override": plan.blocks} if plan.blocks else {}
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
        **blocks,
        **job.get("arguments", {}),
    )


def serve(llm, requests: list[Request], plan: Plan) -> tuple[dict, dict]:
    """The answers by request name, those of later waves with the wave's number behind it, and what happened."""
    answers, counts = {}, {"steps": 0, "preemptions": 0, "cached": 0}
    for number, wave in enumerate(plan.waves or [()]):
        for name, answer in _serve_wave(llm, requests, wave, counts).items():
            answers[f"{name} wave {number}" if number else name] = answer
    return answers, counts


def _serve_wave(llm, requests: list[Request], wave: tuple, counts: dict) -> dict:
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
                answers[output.request_id] = _answer(output)
                counts["cached"] += output.num_cached_tokens or 0
        for name, state in getattr(scheduler, "requests", {}).items():
            preempted[name] = state.num_preemptions
        step += 1
    counts["steps"] += step
    counts["preemptions"] += sum(preempted.values())
    return answers


def score(llm, requests: list[Request], answers: dict) -> dict:
    """Prompt and answer as one prompt: the log-probabilities of the answer's tokens as a prefill gives them, name + " scored"."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = {}
    for request in requests:
        tokens = [*request.prompt, *answers[request.name]["tokens"]]
        (output,) = llm.generate([{"prompt_token_ids": tokens}], greedy, use_tqdm=False)
        rows = output.prompt_logprobs[len(request.prompt) :]
        found[f"{request.name} scored"] = {
            "log_probs": [_bytes(row[token].logprob) for row, token in zip(rows, tokens[len(request.prompt) :], strict=True)]
        }
    return found


def reload(llm, requests: list[Request]) -> dict:
    """The first requests' answers after the weights were loaded once more, name + " reloaded"."""
    llm.collective_rpc("reload_weights")
    answers, _ = serve(llm, requests[:3], Plan("reloaded", (), 0, 0, False, 0))
    return {f"{name} reloaded": answer for name, answer in answers.items()}


def batches(llm, sizes: list[int], vocabulary: int, lengths: list[int], count: int, tokens: int) -> dict[str, list[str]]:
    """Greedy answers to ``count`` random prompts, so many at a time: batch size -> for each prompt its tokens and log-probability bytes
    as one text. Batches of one answer the first eight alone, which take longest."""
    from vllm import SamplingParams

    draw = random.Random(1)
    prompts = [{"prompt_token_ids": [draw.randrange(3, vocabulary) for _ in range(draw.choice(lengths))]} for _ in range(count)]
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, detokenize=False)
    found = {}
    for size in sizes:
        llm.reset_prefix_cache()
        asked = prompts[:8] if size == 1 else prompts
        outputs = [output for i in range(0, len(asked), size) for output in llm.generate(asked[i : i + size], greedy, use_tqdm=False)]
        answers = [_answer(output) for output in outputs]
        found[str(size)] = [" ".join(f"{t}:{p}" for t, p in zip(a["tokens"], a["log_probs"], strict=True)) for a in answers]
        print(f"batch {size}: done", flush=True)
    return found


def speed(llm, vocabulary: int, prompt: int, answer: int, requests: int) -> dict[str, float]:
    """Tokens a second of ``requests`` at once, and milliseconds a token of one alone; the better of two runs each, prompts never repeated."""
    from vllm import SamplingParams

    draw = random.Random(2)
    found = {}
    for name, count in (("throughput", requests), ("alone", 1)):
        best = float("inf")
        for _ in range(3):  # the first warms up
            prompts = [{"prompt_token_ids": [draw.randrange(3, vocabulary) for _ in range(prompt)]} for _ in range(count)]
            greedy = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
            started = time.monotonic()
            llm.generate(prompts, greedy, use_tqdm=False)
            best = min(best, time.monotonic() - started)
        found |= {"tokens_per_second": count * answer / best} if name == "throughput" else {"milliseconds_per_token": 1e3 * best / answer}
        print(found, flush=True)
    return found


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
