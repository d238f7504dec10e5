"""Self-drafts of known quality, and the twin of verified decoding: what vLLM is told as speculative_config's model and as worker_cls.

TPINV_SELF_DRAFTS is a JSON object: ``shares``, of which a request has the one that the sum of its prompt picks, and ``vocabulary``.
"""

import json
import os
import random

from tpinv.integrations.vllm.self_draft import Drafting, SelfDraft, Worker

VARIABLE = "TPINV_SELF_DRAFTS"


class Spoiled(SelfDraft):
    """Drafts always, and exchanges a share of what it has drafted for other tokens, whose keys and values are then another token's."""

    def __init__(self, vllm_config):
        super().__init__(vllm_config)
        told = json.loads(os.environ[VARIABLE])
        self.shares, self.vocabulary = told["shares"], told["vocabulary"]

    def _worthwhile(self, rows: list[int]) -> bool:
        return True

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, **others) -> list[list[int]]:
        drafts = super().propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, **others)
        for row, tokens in enumerate(drafts):
            name = self.runner.input_batch.req_ids[row]
            if tokens and name not in self.runner.waived:
                prompt = self.runner.requests[name].prompt_token_ids
                share = self.shares[sum(prompt) % len(self.shares)]
                draw = random.Random(f"{len(prompt)} {prompt[-1]} {num_tokens_no_spec[row]}")
                drafts[row] = [
                    (token + draw.randrange(1, self.vocabulary)) % self.vocabulary if draw.random() < share else token for token in tokens
                ]
        return drafts


class SpoiledFp8(Spoiled):
    fp8 = True


class KeepsDrafts(Drafting):
    """The twin: rows of the invariant step leave the keys and values of drafts where they are, as a verifier without a cache of its own."""

    def _prepare_inputs(self, scheduler_output, *arguments, **keywords):
        self._scheduled = scheduler_output
        return super()._prepare_inputs(scheduler_output, *arguments, **keywords)

    def _get_slot_mappings(self, *arguments, **keywords):
        found, first = super()._get_slot_mappings(*arguments, **keywords), 0
        for name in self.input_batch.req_ids:
            drafts = len(self._scheduled.scheduled_spec_decode_tokens.get(name, ()))
            for slots in found[0].values():
                slots[first : first + drafts] = -1
            first += self._scheduled.num_scheduled_tokens[name]
        return found


class TwinWorker(Worker):
    runner = KeepsDrafts
