"""An ``LLM`` as one of the two engines of verified decoding (tpinv.inference.verified_elsewhere)."""

from collections.abc import Sequence

from tpinv.inference.verified_elsewhere import Completion, Job


class Engine:
    """``llm``: vllm.LLM, with or without the plugin; the one that decides must have it (``assert_active``)."""

    def __init__(self, llm):
        self.llm = llm

    def complete(self, jobs: Sequence[Job]) -> list[Completion]:
        from vllm import SamplingParams

        if not jobs:
            return []
        settings = [
            SamplingParams(
                max_tokens=job.tokens, temperature=job.temperature, seed=job.seed if job.temperature else None, top_k=job.top_k,
                top_p=job.top_p, logprobs=0, prompt_logprobs=2 if job.scored else None, ignore_eos=True, detokenize=False,
            )
            for job in jobs
        ]  # fmt: skip
        outputs = self.llm.generate([{"prompt_token_ids": list(job.prompt)} for job in jobs], settings, use_tqdm=False)
        return [_completion(output) for output in outputs]


def _completion(output) -> Completion:
    answer = output.outputs[0]
    log_probs = tuple(row[token].logprob for row, token in zip(answer.logprobs, answer.token_ids, strict=True))
    scored = tuple({token: entry.logprob for token, entry in (row or {}).items()} for row in output.prompt_logprobs or ())
    return Completion(tuple(answer.token_ids), log_probs, scored)
