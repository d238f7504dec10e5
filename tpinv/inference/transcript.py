"""Transcripts: what a model answered, with the bytes of its log-probabilities, so that anyone can compute them again (`tpinv audit`).

One JSON object a line:

    {"tokens": [1, 5, 9, 2], "first": 2, "log_probs": ["3d0abfc0", "00f3b1bf"], "temperature": 1.0, "dtype": "bfloat16", "device": "cpu",
     "fingerprint": "tpinv1-rfc6962-L8-float32-sums.1a2b3c4d"}

tokens: prompt and answer. first: where the answer begins, at least 1. log_probs: of tokens[first:], each a float32 as eight hexadecimal
digits, little-endian. They are of logits / temperature over the whole vocabulary. dtype: in which the model computed; device: the kind of
device, on which the bytes depend. fingerprint: of every order of additions (tpinv.contract).
"""

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from tpinv.contract import fingerprint
from tpinv.tree import ReductionTree

DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Answer:
    """One line. ValueError, naming the field, for what cannot be one."""

    tokens: tuple[int, ...]
    first: int
    log_probs: tuple[str, ...]
    fingerprint: str
    temperature: float = 1.0
    dtype: str = "bfloat16"
    device: str = "cpu"

    def __post_init__(self):
        whole = lambda value: isinstance(value, int) and not isinstance(value, bool)  # noqa: E731
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        checks = {
            "tokens": isinstance(self.tokens, tuple) and all(whole(t) and t >= 0 for t in self.tokens) and len(self.tokens) > 1,
            "first": whole(self.first) and 1 <= self.first < len(self.tokens),
            "log_probs": isinstance(self.log_probs, tuple) and all(map(_is_float32, self.log_probs)),
            "fingerprint": isinstance(self.fingerprint, str) and bool(self.fingerprint),
            "temperature": number and math.isfinite(self.temperature) and self.temperature > 0,
            "dtype": self.dtype in DTYPES,
            "device": self.device in DEVICES,
        }
        if wrong := [name for name, fine in checks.items() if not fine]:
            raise ValueError(f"{', '.join(wrong)}: not as a transcript has them (tpinv.inference.transcript says how)")
        if len(self.log_probs) != len(self.tokens) - self.first:
            raise ValueError(
                f"{len(self.log_probs)} log_probs for {len(self.tokens) - self.first} tokens from {self.first} on; there must be one for each"
            )


def to_hex(value: float) -> str:
    """A float32, which Python holds as a float64, as the eight digits of its bytes."""
    return struct.pack("<f", value).hex()


def to_float(text: str) -> float:
    """The inverse of :func:`to_hex`."""
    return struct.unpack("<f", bytes.fromhex(text))[0]


def from_vllm(outputs: Iterable, tree: ReductionTree, *, dtype: str, device: str, temperature: float = 1.0) -> list[Answer]:
    """Answers of what ``LLM.generate`` returned, a request's first completion each, asked for with ``SamplingParams(logprobs=0)`` or more.

    Args:
        outputs: vllm.RequestOutput.
        tree: the plugin's (TPINV_VLLM).
        temperature: by which the engine divided before it took log-probabilities: the request's with
            ``logprobs_mode="processed_logprobs"`` (top-k, top-p and penalties off), else 1.

    Raises:
        ValueError: a completion that is empty or without log-probabilities.
    """
    answers = []
    for output in outputs:
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        if not tokens or completion.logprobs is None:
            raise ValueError(f"request {output.request_id} has {len(tokens)} tokens and no log-probabilities to audit; set logprobs=0")
        log_probs = tuple(to_hex(row[token].logprob) for row, token in zip(completion.logprobs, tokens, strict=True))
        prompt = list(output.prompt_token_ids)
        answers.append(Answer((*prompt, *tokens), len(prompt), log_probs, fingerprint(tree), temperature, dtype, device))
    return answers


def write(path: str, answers: Iterable[Answer]) -> None:
    """Writes a transcript, one answer a line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(answer)) + "\n" for answer in answers)


def read(path: str) -> list[Answer]:
    """ValueError with the line's number for anything that is no transcript, or an empty one."""
    with open(path, encoding="utf-8", errors="strict") as file:
        try:
            answers = list(_lines(path, file))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8 ({error}); a transcript has one JSON object a line") from None
    if not answers:
        raise ValueError(f"{path} holds no answer, so that there is nothing to compare")
    return answers


def tree_of(text: str) -> ReductionTree:
    """The tree that a fingerprint names. ValueError where this version of tpinv adds in another order."""
    found = re.match(r"tpinv\d+-\w+-L(\d+)-(float32|bfloat16)(-|$)", text)
    tree = ReductionTree(int(found[1]), found[2]) if found and int(found[1]) else None
    if tree is None or fingerprint(tree) != text:
        expected = fingerprint(tree) if tree else fingerprint(ReductionTree(8))
        raise ValueError(
            f"fingerprint {text!r} names another order of additions than this tpinv has ({expected!r}); audit with the version that wrote it"
        )
    return tree


def _lines(path: str, file: Iterable[str]) -> Iterator[Answer]:
    names = {"tokens", "first", "log_probs", "fingerprint"}
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
        if not isinstance(record, dict) or names - record.keys() or record.keys() - names - {"temperature", "dtype", "device"}:
            given = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{path}, line {number}: {given} must be an object with {sorted(names)}, and maybe temperature, dtype, device")
        try:
            yield Answer(**{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def _is_float32(text) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{8}", text) is not None
