"""Drafts of known quality for vLLM: ``speculative_config={"method": "custom_class", "model": "tpinv.harness.vllm.drafts.KnownAnswers"}``.

The file that TPINV_DRAFTS names holds answers; what is drafted of a request is the rest of its answer, of a random length up to
``num_speculative_tokens``, with a share of the tokens exchanged for others. All is a function of the place, the same on every rank.
"""

import json
import os
import random

VARIABLE = "TPINV_DRAFTS"


def write(path: str, answers: list[tuple[list[int], list[int], float]], vocabulary: int, shortest: int = 0) -> dict[str, str]:
    """``answers``: (prompt, answer, share of wrong drafts). ``shortest``: drafts of a step, at least. Returns the environment to set."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump({"vocabulary": vocabulary, "shortest": shortest, "answers": answers}, file)
    os.replace(f"{path}.part", path)
    return {VARIABLE: path}


class KnownAnswers:
    def __init__(self, vllm_config):
        self.most = vllm_config.speculative_config.num_speculative_tokens
        self.read = None
        self._read()

    def _read(self) -> None:
        """What the file says now: an engine that has answered without drafts may be told its answers, and asked again."""
        changed = os.stat(os.environ[VARIABLE]).st_mtime_ns
        if changed == self.read:
            return
        with open(os.environ[VARIABLE], encoding="utf-8") as file:
            told = json.load(file)
        self.read, self.vocabulary, self.shortest = changed, told["vocabulary"], told["shortest"]
        self.answers: dict[int, list] = {}  # by the first token
        for prompt, answer, share in told["answers"]:
            self.answers.setdefault(prompt[0], []).append((tuple(prompt), answer, share))

    def load_model(self, target_model) -> None:
        """Nothing to load."""

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, **others) -> list[list[int]]:
        self._read()
        return [
            self._draft(tuple(token_ids_cpu[row, : num_tokens_no_spec[row]].tolist())) if len(sampled) else []
            for row, sampled in enumerate(sampled_token_ids)
        ]

    def _draft(self, context: tuple[int, ...]) -> list[int]:
        for prompt, answer, share in self.answers.get(context[0], ()):
            if context[: len(prompt)] == prompt and context[len(prompt) :] == tuple(answer[: len(context) - len(prompt)]):
                draw = random.Random(f"{len(prompt)} {prompt[-1]} {len(context)}")
                rest = answer[len(context) - len(prompt) :][: draw.randint(min(self.shortest, self.most), self.most)]
                return [
                    (token + draw.randrange(1, self.vocabulary)) % self.vocabulary if draw.random() < share else token for token in rest
                ]
        return []
