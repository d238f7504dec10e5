"""Serves requests with or without speculation and says all that must not depend on it: tokens, log-probabilities, bytes of keys and values.

python -m tpinv.harness.vllm.speculate JOB.json RESULT.json    in a process of its own, as serve_plan, whose jobs these are: ``asked`` holds
the requests (name, prompt, arguments of SamplingParams, the step before which it arrives).
"""

import fcntl
import functools
import hashlib
import json
import os
import random
import sys
import time

from tpinv.harness.vllm import drafts, serve_plan
from tpinv.harness.vllm.schedule import Plan


def main(job_path: str, result_path: str) -> None:
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    os.environ.update(serve_plan._environment(job))
    turn = Turn(job.get("locks", []))
    started = time.monotonic()
    llm = serve_plan._engine(job, Plan(**job["plan"]))
    start = time.monotonic() - started
    if job["layers"] == "tpinv":
        from tpinv.integrations.vllm import assert_active

        assert_active(llm)
    while "wait_for" in job and not os.path.exists(job["wait_for"]):
        time.sleep(0.2)
    started = time.monotonic()
    answers, counts = serve(llm, job["asked"], job["kv"])
    result = {"answers": answers, "counts": counts, "start": start, "seconds": time.monotonic() - started}
    write(f"{result_path}.answers", result)
    if "speed" in job and turn.alone(job.get("until", float("inf"))):
        result["speed"] = speed(llm, **job["speed"])
    write(result_path, result)


def write(path: str, result: dict) -> None:
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.replace(f"{path}.new", path)


class Turn:
    """Engines that share GPUs: all may start and answer at once, and one at a time is timed. ``locks``: a file for each GPU."""

    def __init__(self, locks: list[str]):
        self.files = [open(path, "a", encoding="utf-8") for path in locks]  # noqa: SIM115 - held as long as the process
        for file in self.files:
            fcntl.flock(file, fcntl.LOCK_SH)

    def alone(self, until: float) -> bool:
        """Waits until nobody else starts or answers there; False after the time ``until``."""
        for file in self.files:
            fcntl.flock(file, fcntl.LOCK_UN)
        for file in self.files:
            while time.time() < until:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
        return time.time() < until


def serve(llm, asked: list[dict], kv: bool) -> tuple[dict, dict]:
    """Answers by name: tokens, log_probs, candidates (serve_plan) and ``kv``, a digest of every position's keys and values, all layers and
    heads, up to the one before the last token, which no step has computed. And counts: steps, preemptions, drafts that were kept (those of a
    request's last step are not counted), drafts of the scheduled steps and how many of them were accepted."""
    from vllm import SamplingParams

    engine, waiting, answers, pages = llm.llm_engine, sorted(asked, key=lambda request: request["step"]), {}, {}
    step = kept = 0
    by_name = {request["name"]: request for request in asked}
    scheduler = engine.engine_core.engine_core.scheduler
    preempted: dict[str, int] = {}
    update, decided = scheduler.update_from_output, {"drafted": 0, "accepted": 0}

    def update_from_output(scheduled, output):
        """When all blocks of a step are taken, and none of a finished request's is given back."""
        pages.update(_blocks(scheduler))
        for name, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True):
            drafts = scheduled.scheduled_spec_decode_tokens.get(name, ())
            decided["drafted"] += len(drafts)
            decided["accepted"] += len(tokens) - 1 if drafts else 0
        return update(scheduled, output)

    scheduler.update_from_output = update_from_output
    while waiting or engine.has_unfinished_requests():
        while waiting and (waiting[0]["step"] <= step or not engine.has_unfinished_requests()):
            request = waiting.pop(0)
            sampling = SamplingParams(**{"logprobs": 3, "detokenize": False} | request["sampling"])
            engine.add_request(request["name"], {"prompt_token_ids": request["prompt"]}, sampling)
        before = _produced(scheduler)
        outputs = engine.step()
        kept += sum(max(0, count - before.get(name, count) - 1) for name, count in _produced(scheduler).items())
        for output in outputs:
            if output.finished:
                name = output.request_id
                answers[name] = serve_plan._answer(output) if output.outputs[0].logprobs else {"tokens": list(output.outputs[0].token_ids)}
                if kv:
                    length = len(by_name[name]["prompt"]) + len(answers[name]["tokens"]) - 1
                    answers[name]["kv"] = _digests(llm, pages[tuple(by_name[name]["prompt"])], length)
        for name, state in scheduler.requests.items():
            preempted[name] = state.num_preemptions
        step += 1
    return answers, {"steps": step, "preemptions": sum(preempted.values()), "kept": kept} | decided


def speed(
    llm, vocabulary: int, prompt: int, answer: int, batches: list[int], drafts_at: str | None = None, shares=(), deterministic=()
) -> dict[str, dict[str, float]]:
    """Tokens a second of greedy decoding, without the prefill: batch size -> as drafts are; with ``drafts_at``, where KnownAnswers reads,
    also for each share of wrong drafts; for each share of deterministic requests, where the others waive the guarantee. The faster of two
    runs, after one that warms up."""
    from vllm import SamplingParams

    draw, found = random.Random(2), {}
    for batch in batches:
        prompts = [{"prompt_token_ids": [draw.randrange(3, vocabulary) for _ in range(prompt)]} for _ in range(batch)]
        settings = lambda extra: SamplingParams(temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)  # noqa: E731
        measure = functools.partial(_decode_seconds, llm, prompts, answer=answer)
        seconds, answers = measure([settings(None) for _ in range(batch)])
        mine = found[f"batch {batch}"] = {"as it is": batch * (answer - 1) / seconds}
        for share in shares if drafts_at else []:
            drafts.write(
                drafts_at, [(p["prompt_token_ids"], a, share) for p, a in zip(prompts, answers, strict=True)], vocabulary, shortest=99
            )
            seconds, again = measure([settings(None) for _ in range(batch)])
            mine[f"{share:.0%} wrong"] = batch * (answer - 1) / seconds
            mine["answers that differ"] = mine.get("answers that differ", 0) + sum(a != b for a, b in zip(answers, again, strict=True))
        for share in deterministic:
            kept = [i < round(share * batch) for i in range(batch)]
            seconds, again = measure([settings(None if keeps else {"deterministic": False}) for keeps in kept])
            mine[f"{share:.0%} deterministic"] = batch * (answer - 1) / seconds
            mine["answers that differ"] = mine.get("answers that differ", 0) + sum(
                a != b for a, b, keeps in zip(answers, again, kept, strict=True) if keeps
            )
        print(f"batch {batch}: {mine}", flush=True)
    return found


def _decode_seconds(llm, prompts: list[dict], samplings: list, answer: int) -> tuple[float, list[list[int]]]:
    best = {}
    for tokens in (1, answer):
        for sampling in samplings:
            sampling.max_tokens = tokens
        for run in range(3):
            llm.reset_prefix_cache()
            started = time.monotonic()
            outputs = llm.generate(prompts, samplings, use_tqdm=False)
            best[tokens] = min(best.get(tokens, float("inf")), time.monotonic() - started) if run else float("inf")
    return best[answer] - best[1], [list(output.outputs[0].token_ids) for output in outputs]


def _blocks(scheduler) -> dict[tuple[int, ...], list[int]]:
    """Prompt -> blocks of the target's layers, which are the first group, or share it with the drafter's."""
    blocks_of = scheduler.kv_cache_manager.get_block_ids
    return {tuple(request.prompt_token_ids): list(blocks_of(request.request_id)[0]) for request in scheduler.running}


def _produced(scheduler) -> dict[str, int]:
    return {name: request.num_output_tokens for name, request in scheduler.requests.items()}


def _digests(llm, blocks: list[int], length: int) -> list[str]:
    ranks = llm.collective_rpc(read_cache, args=(blocks, length))
    layers = ranks[0].keys()
    found = []
    for position in range(min(len(next(iter(ranks[0].values()))), length)):
        digest = hashlib.sha256()
        for layer in layers:
            for rank in ranks:
                digest.update(rank[layer][position])
        found.append(digest.hexdigest()[:16])
    return found


def read_cache(worker, blocks: list[int], length: int) -> dict[str, list[bytes]]:
    """In a worker: layer -> the bytes of each position, its heads one behind another. Layers of a drafter are left out."""
    import torch

    runner = worker.model_runner
    context = runner.vllm_config.compilation_config.static_forward_context
    found = {}
    for name, layer in context.items():
        cache = getattr(layer, "kv_cache", None)
        if cache is None or name not in _target_layers(runner):
            continue
        cache = cache[0] if isinstance(cache, (list, tuple)) else cache
        rows = cache[torch.tensor(blocks, device=cache.device)].transpose(1, 2).flatten(0, 1)[:length]  # [positions, heads, 2 d]
        found[name] = [row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows.cpu()]
    return found


def _target_layers(runner) -> set[str]:
    from vllm.model_executor.layers.attention import Attention

    return {module.layer_name for module in runner.get_model().modules() if isinstance(module, Attention)}


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as serve_plan
