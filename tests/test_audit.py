"""tpinv audit: a transcript decoded token by token is computed again by other frameworks at other sizes, to the byte; what was tampered
with, what another model said and what stock layers said is found; what is no transcript is an error."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from tpinv import ReductionTree
from tpinv.cli import main
from tpinv.contract import fingerprint
from tpinv.harness import across
from tpinv.inference import apply_temperature, log_softmax
from tpinv.inference.transcript import Answer, from_vllm, read, to_float, to_hex, tree_of, write
from tpinv.integrations.transformers import convert

TREE = ReductionTree(8)
REQUESTS = [((5, 9, 200), 6, 1.0), ((17,), 9, 0.7), (tuple(range(30, 60)), 4, 1.0)]  # prompt, tokens, temperature


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("llama"))
    across.make_checkpoint("llama", path)
    return path


@torch.no_grad()
def decode(path: str, layers: str) -> list[Answer]:
    """Greedy answers, a token at a time with a cache."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    if layers == "tpinv":
        convert(model, tree=TREE)
    answers = []
    for prompt, count, temperature in REQUESTS:
        tokens, log_probs, cache, given = list(prompt), [], None, torch.tensor([prompt])
        for _ in range(count):
            step = model(given, past_key_values=cache, use_cache=True)
            cache, logits = step.past_key_values, apply_temperature(step.logits[0, -1:], temperature)
            row = (log_softmax(logits, TREE) if layers == "tpinv" else logits.float().log_softmax(-1))[0]
            tokens.append(int(row.argmax()))
            log_probs.append(to_hex(row.max().item()))
            given = torch.tensor([tokens[-1:]])
        answers.append(Answer(tuple(tokens), len(prompt), tuple(log_probs), fingerprint(TREE), temperature))
    return answers


@pytest.fixture(scope="module")
def answers(checkpoint):
    return decode(checkpoint, "tpinv")


def audit(tmp_path, answers, *arguments) -> int:
    write(str(tmp_path / "answers.jsonl"), answers)
    return main(["audit", str(tmp_path / "answers.jsonl"), *arguments])


@pytest.mark.parametrize(
    ("framework", "tp", "sp"),
    [
        ("transformers", 1, False),
        ("megatron", 4, False),
        ("megatron", 4, True),
        pytest.param("torchtitan", 2, True, marks=pytest.mark.torchtitan),
    ],
)
def test_equal(framework, tp, sp, answers, checkpoint, tmp_path, capsys):
    pytest.importorskip("megatron.core" if framework == "megatron" else framework)
    more = ["--sequence-parallel"] * sp
    assert audit(tmp_path, answers, "--model", checkpoint, "--tp", str(tp), "--framework", framework, *more) == 0
    assert f"19 tokens: all equal ({framework}, TP = {tp}{', SP' * sp}, " in capsys.readouterr().out


def test_one_bit_is_found(answers, checkpoint, tmp_path, capsys):
    given = list(answers)
    raw = bytearray.fromhex(given[1].log_probs[3])
    raw[0] ^= 1
    given[1] = replace(given[1], log_probs=(*given[1].log_probs[:3], raw.hex(), *given[1].log_probs[4:]))
    assert audit(tmp_path, given, "--model", checkpoint, "--json", str(tmp_path / "out.json")) == 1
    told = capsys.readouterr().out
    assert "1 differ" in told and "answer 2, token 4 " in told and raw.hex() in told
    assert json.loads((tmp_path / "out.json").read_text())["first"] == {"answer": 1, "token": 4}


def test_another_token_prompt_model_or_temperature_is_found(answers, checkpoint, tmp_path):
    swapped = replace(answers[0], tokens=(5, 9, 201, *answers[0].tokens[3:]))
    assert audit(tmp_path, [swapped], "--model", checkpoint) == 1
    assert audit(tmp_path, [replace(answers[0], temperature=0.9)], "--model", checkpoint) == 1
    across.make_checkpoint("qwen3", str(tmp_path / "other"))
    assert audit(tmp_path, answers[:1], "--model", str(tmp_path / "other")) == 1


def test_stock_layers_are_found(checkpoint, tmp_path):
    assert audit(tmp_path, decode(checkpoint, "stock"), "--model", checkpoint) == 1


def line(answer: Answer, **changes) -> str:
    return json.dumps({name: value for name, value in (asdict(answer) | changes).items() if value is not None})


NO_TRANSCRIPT = {
    "no JSON": lambda a: "tokens: 1, 2",
    "must be an object": lambda a: "[1, 2]",
    "'tokens'": lambda a: line(a, tokens=None),
    "'fingerprint'": lambda a: line(a, fingerprint=None),
    "'notes'": lambda a: line(a, notes="hello"),
    "holds no answer": lambda a: "\n\n",
    "tokens: not as": lambda a: line(a, tokens=[1, -2, 3, 4, 5, 6, 7, 8, 9]),
    "tokens, first: not as": lambda a: line(a, tokens=["a", "b"], first=0, log_probs=[]),
    "first: not as": lambda a: line(a, first=True),
    "log_probs: not as": lambda a: line(a, log_probs=[0.5] * 6),
    "log_probs: not as ": lambda a: line(a, log_probs=["zz00ff00"] * 6),
    "5 log_probs for 6": lambda a: line(a, log_probs=a.log_probs[:5]),
    "temperature: not as": lambda a: line(a, temperature=0),
    "dtype: not as": lambda a: line(a, dtype="int8"),
    "device: not as": lambda a: line(a, device="abacus"),
    "another order": lambda a: line(a, fingerprint="tpinv1-rfc6962-L8-float32-sums.00000000"),
    "another order ": lambda a: line(a, fingerprint="sequential"),
    "another order  ": lambda a: line(a, fingerprint="tpinv1-rfc6962-L0-float32-sums.00000000"),
    "several values of fingerprint": lambda a: line(a) + "\n" + line(a, fingerprint=fingerprint(ReductionTree(16))),
    "several values of dtype": lambda a: line(a) + "\n" + line(a, dtype="float32"),
    "is not audited": lambda a: line(a, dtype="float16"),
    "computed on a GPU": lambda a: line(a, device="cuda"),
    "past this model's vocabulary": lambda a: line(a, tokens=[5, 9, 256, *a.tokens[3:]]),
}


@pytest.mark.parametrize("message", NO_TRANSCRIPT)
def test_what_is_no_transcript_is_an_error(message, answers, checkpoint, tmp_path, capsys):
    if message == "computed on a GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    path = tmp_path / "answers.jsonl"
    path.write_text(NO_TRANSCRIPT[message](answers[0]))
    assert main(["audit", str(path), "--model", checkpoint]) == 2
    assert message.strip() in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "3"], "does not divide"),
        (["--tp", "0"], "at least 1"),
        (["--tp", "2", "--framework", "transformers"], "whole models"),
        (["--sequence-parallel"], "of which --tp 1 has none"),
        (["--json", "/nowhere/out.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_audited_is_an_error(arguments, message, answers, checkpoint, tmp_path, capsys):
    assert audit(tmp_path, answers, "--model", checkpoint, *arguments) == 2
    assert message in capsys.readouterr().err


def test_no_model_and_no_transcript(answers, tmp_path, capsys):
    assert audit(tmp_path, answers, "--model", str(tmp_path)) == 2
    assert "config.json" in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "missing.jsonl"), "--model", str(tmp_path)]) == 2


def test_written_is_read(answers, tmp_path):
    write(str(tmp_path / "a.jsonl"), answers)
    assert read(str(tmp_path / "a.jsonl")) == answers
    for value in (-0.0, 1e-45, -123.456, float("-inf")):
        assert to_hex(to_float(to_hex(value))) == to_hex(value)
    for tree in (ReductionTree(24), ReductionTree(8, "bfloat16")):
        assert tree_of(fingerprint(tree)) == tree


def test_answers_of_vllm():
    rows = [{7: SimpleNamespace(logprob=-0.5), 3: SimpleNamespace(logprob=-2.0)}, {9: SimpleNamespace(logprob=-0.25)}]
    output = SimpleNamespace(request_id="0", prompt_token_ids=[1, 2], outputs=[SimpleNamespace(token_ids=[3, 9], logprobs=rows)])
    (answer,) = from_vllm([output], TREE, dtype="bfloat16", device="cpu")
    assert answer.tokens == (1, 2, 3, 9) and answer.first == 2 and [to_float(text) for text in answer.log_probs] == [-2.0, -0.25]
    output.outputs[0].logprobs = None
    with pytest.raises(ValueError, match="logprobs=0"):
        from_vllm([output], TREE, dtype="bfloat16", device="cpu")
