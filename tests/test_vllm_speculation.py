"""Speculation in the real engine on a CPU: tokens, log-probabilities and bytes of keys and values of decoding without it (make test-vllm)."""

import concurrent.futures
import copy
import json
import random
import sys
import types

import pytest
import torch

from tpinv import inference
from tpinv.harness.vllm import drafts, model
from tpinv.harness.vllm.verify import run_job

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

VOCABULARY = 512
SHARES = (0.0, 0.1, 0.5, 1.0)  # of drafts that are wrong
SAMPLING = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "seed": 12, "top_k": 20},
    {"temperature": 1.2, "seed": 13, "top_p": 0.8, "top_k": 40},
    {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.7, "min_tokens": 10, "stop_token_ids": [*range(3, 120)]},
    {"temperature": 0, "allowed_token_ids": [*range(100, 200)]},
    {"temperature": 0, "stop_token_ids": [*range(3, 60)]},
]


def asked(apart: int) -> list[dict]:
    """Requests that arrive ``apart`` steps from each other; every third begins with a common prefix."""
    draw = random.Random(3)
    tokens = lambda n: [draw.randrange(3, VOCABULARY) for _ in range(n)]  # noqa: E731
    prefix, found = tokens(70), []
    for i, sampling in enumerate(SAMPLING * 2):
        prompt = (prefix if i % 3 == 0 else []) + tokens(draw.randint(1, 90))
        sampling = {"max_tokens": draw.randint(20, 40), "ignore_eos": True} | sampling
        found.append({"name": f"r{i}", "prompt": prompt, "sampling": sampling, "step": i * apart})
    return found


def job(checkpoint: str, tp: int, core: int, speculative: dict | None, environment: dict | None = None) -> dict:
    """Without speculation every request alone; with it all of them in few blocks, in chunks, with cached prefixes."""
    arguments = {"speculative_config": speculative, "async_scheduling": False} if speculative else {}
    plan = {"name": str(speculative and speculative["method"]), "waves": []}
    plan |= {"budget": 90, "sequences": 8, "prefix_cache": True, "blocks": 24} if speculative else {
        "budget": 4096, "sequences": 1, "prefix_cache": False, "blocks": 0}  # fmt: skip
    return {
        "module": "speculate", "layers": "tpinv", "leaves": 8, "device": "cpu", "model": checkpoint, "dtype": "bfloat16", "eager": True,
        "block": 32, "longest": 256, "tp": tp, "first_core": core, "plan": plan, "kv": True, "asked": asked(1 if speculative else 10**6),
        "arguments": arguments, "environment": environment or {},
    }  # fmt: skip


NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
WORKER, TWIN = "tpinv.integrations.vllm.self_draft.Worker", "tpinv.harness.vllm.self_drafts.TwinWorker"


def self_draft(name: str) -> tuple[dict, dict]:
    """speculative_config and environment."""
    environment = {"TPINV_SELF_DRAFTS": json.dumps({"vocabulary": VOCABULARY, "shares": SHARES})}
    return {"method": "custom_class", "model": name, "num_speculative_tokens": 5}, environment


def mixed(given: dict) -> dict:
    """Every second request waives the guarantee, if a draft has all that it asks for."""
    for request in given["asked"][::2]:
        if request["sampling"].keys() <= {"max_tokens", "ignore_eos", "temperature", "seed", "top_k"}:
            request["sampling"] |= {"extra_args": {"deterministic": False}, "logprobs": None}
    return given


def eagle_head(directory) -> str:
    """A random one, which is nearly always wrong: a layer, and the product that halves its input of embedding and hidden state."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    spec, generator = model.Spec(), torch.Generator().manual_seed(1)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=spec.hidden, intermediate_size=spec.intermediate, num_hidden_layers=1,
        num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads, head_dim=spec.width, vocab_size=spec.vocabulary,
        max_position_embeddings=spec.longest, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(directory)
    attention, cached = spec.heads * spec.width, spec.kv_heads * spec.width
    shapes = {
        "fc": (spec.hidden, 2 * spec.hidden), "layers.0.post_attention_layernorm": (spec.hidden,),
        "layers.0.self_attn.q_proj": (attention, spec.hidden), "layers.0.self_attn.k_proj": (cached, spec.hidden),
        "layers.0.self_attn.v_proj": (cached, spec.hidden), "layers.0.self_attn.o_proj": (spec.hidden, attention),
        "layers.0.mlp.gate_proj": (spec.intermediate, spec.hidden), "layers.0.mlp.up_proj": (spec.intermediate, spec.hidden),
        "layers.0.mlp.down_proj": (spec.hidden, spec.intermediate),
    }  # fmt: skip
    weights = {f"{name}.weight": (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16() for name, shape in shapes.items()}
    save_file(weights, str(directory / "model.safetensors"))
    return str(directory)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return model.write(str(tmp_path_factory.mktemp("models") / "llama"), model.Spec(), torch.bfloat16)


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory):
    """Every request alone, without speculation."""
    found = run_job(job(checkpoint, 1, 0, None), str(tmp_path_factory.mktemp("plain") / "plain"), 600)
    assert len(found["answers"]) == 16 and {len(answer["tokens"]) > 1 for answer in found["answers"].values()} == {True}
    produced = sum(len(answer["tokens"]) for answer in found["answers"].values())
    assert found["counts"]["steps"] >= produced > 350
    return found


def run_two_at_a_time(jobs: dict[str, dict], directory) -> dict[str, dict]:
    """The second of each two on another core."""
    names = list(jobs)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = {
            name: pool.submit(run_job, jobs[name] | {"first_core": i % 2}, str(directory / f"{i}"), 900) for i, name in enumerate(names)
        }
        return {name: run.result() for name, run in runs.items()}


def differing(found: dict, expected: dict, names=None) -> list[str]:
    """request: what, of all that was answered."""
    pairs = [(r, what) for r in names or expected["answers"] for what in expected["answers"][r]]
    return [f"{r}: {what}" for r, what in pairs if found["answers"][r][what] != expected["answers"][r][what]]


@pytest.mark.timeout(1800)
def test_the_bytes_of_decoding_without_speculation(checkpoint, plain, tmp_path):
    """Drafts by an n-gram, by an EAGLE head, by the same model with vLLM's own layers, and by what knows the answers and is wrong 0, 10, 50 or
    100 % of the time; greedy, seeded, top-k, top-p, penalties, stops; chunked prefill, preemption; TP = 1 and 2."""
    answers = [(r["prompt"], plain["answers"][r["name"]]["tokens"], SHARES[i % 4]) for i, r in enumerate(asked(1))]
    environment = drafts.write(str(tmp_path / "drafts.json"), answers, VOCABULARY)
    known = {"method": "custom_class", "model": "tpinv.harness.vllm.drafts.KnownAnswers", "num_speculative_tokens": 8}
    head = {"method": "eagle", "model": eagle_head(tmp_path / "head"), "num_speculative_tokens": 2}
    jobs = {
        "draft_model": job(checkpoint, 1, 0, {"method": "draft_model", "model": checkpoint, "num_speculative_tokens": 3}),
        "ngram": job(checkpoint, 1, 0, NGRAM),
        "eagle": job(checkpoint, 1, 0, head),
        "known answers": job(checkpoint, 2, 0, known, environment),
    }
    found = run_two_at_a_time(jobs, tmp_path)
    print({name: result["counts"] for name, result in found.items()})
    assert {name: differing(result, plain) for name, result in found.items()} == dict.fromkeys(found, [])
    assert found["known answers"]["counts"]["kept"] > 100 and found["draft_model"]["counts"]["kept"] > 50
    assert sum(result["counts"]["preemptions"] for result in found.values())


@pytest.mark.timeout(1800)
def test_a_self_draft(checkpoint, plain, tmp_path):
    """The target's own modules with fast arithmetic, into the requests' own slots, exchanged for wrong tokens 0, 10, 50 and 100 % of the time:
    the bytes of decoding without, and with fp8 weights at TP = 2 beside requests that waive them. Two twins: an invariant step that leaves
    the draft's keys and values where they are, and the requests that waive."""
    spoiled, fp8 = (self_draft(f"tpinv.harness.vllm.self_drafts.{name}") for name in ("Spoiled", "SpoiledFp8"))
    jobs = {
        "mixed, TP = 2": mixed(job(checkpoint, 2, 0, *fp8)),
        "bfloat16": job(checkpoint, 1, 0, *spoiled),
        "keeps drafts": job(checkpoint, 1, 0, *fp8),
    }
    for name, given in jobs.items():
        given["arguments"]["worker_cls"] = TWIN if name == "keeps drafts" else WORKER
    waived = [request["name"] for request in jobs["mixed, TP = 2"]["asked"] if "extra_args" in request["sampling"]]
    kept = [name for name in plain["answers"] if name not in waived]
    found = run_two_at_a_time(jobs, tmp_path)
    print({name: result["counts"] for name, result in found.items()})
    assert len(waived) == 4 and differing(found["mixed, TP = 2"], plain, kept) == []
    assert differing(found["bfloat16"], plain) == []
    assert all(result["counts"]["accepted"] > 50 for result in found.values())
    # Requests that waive have answers of the length that was asked for, and in the cache what the fast kernels left there.
    mine, theirs = ([answers["answers"][name] for name in waived] for answers in (found["mixed, TP = 2"], plain))
    assert [len(answer["tokens"]) for answer in mine] == [len(answer["tokens"]) for answer in theirs]
    assert all(a["kv"] != b["kv"] for a, b in zip(mine, theirs, strict=True))
    broken = differing(found["keeps drafts"], plain)
    print(f"the twin: {len(broken)} differ")
    assert {"kv", "log_probs"} <= {what.split(": ")[1] for what in broken}


@pytest.mark.timeout(900)
def test_stock_speculation_changes_bytes(checkpoint, tmp_path):
    """The twin in the engine: stock vLLM, greedy requests, with an n-gram at TP = 2 against each alone without. (At TP = 1, in layers as small
    as these, a CPU's BLAS has the same bits for one row and for six.)"""
    jobs = {"plain": job(checkpoint, 1, 0, None), "ngram": job(checkpoint, 2, 0, NGRAM)}
    for given in jobs.values():
        given["asked"] = [request for request in given["asked"] if request["sampling"]["temperature"] == 0]
        given |= {"layers": "stock", "kv": False}
    found = run_two_at_a_time(jobs, tmp_path)
    broken = differing(found["ngram"], found["plain"])
    print(f"stock: {broken}")
    assert "log_probs" in {what.split(": ")[1] for what in broken}


# -- the acceptance, without an engine -----------------------------------------------------------------------------------------------


def step(temperature, counts=(3, 0, 2, 1)):
    """Processed logits of a step of requests with so many drafts, drafts that are mostly right, and what plain steps would draw."""
    from tpinv.integrations.vllm.sampling import RequestKeys

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts) + len(counts), 50, generator=generator) * 3
    keys = RequestKeys(types.SimpleNamespace(model_config=types.SimpleNamespace(seed=0)), torch.device("cpu"), False)
    keys.rows = {i: (20 + i, 7 + i, [0] * (5 + i)) for i in range(len(counts))}
    starts, plain = [sum(counts[:i]) + i for i in range(len(counts))], []
    for i, count in enumerate(counts):
        for row in range(count + 1):
            logits = rows[starts[i] + row : starts[i] + row + 1]
            random_one = inference.sample(logits, [20 + i], [7 + i + 5 + i - 1 + row])
            plain.append(int(random_one if temperature[i] else inference.greedy(logits)))
    last = [start + count for start, count in zip(starts, counts, strict=True)]
    drafted = [i for i in range(len(rows)) if i not in last]
    metadata = types.SimpleNamespace(
        all_greedy=not any(temperature),
        temperature=torch.tensor(temperature),
        logitsprocs=types.SimpleNamespace(argmax_invariant=[keys], all=[keys]),
    )
    return rows[drafted], [plain[i] for i in drafted], torch.tensor([[plain[i]] for i in last]), metadata, list(counts)


def accept(rows, wanted, bonus, metadata, counts, wrong=()):
    from tpinv.integrations.vllm.speculation import accept_equal

    tokens = torch.tensor([(t + 1) % 50 if i in wrong else t for i, t in enumerate(wanted)], dtype=torch.int32)
    return accept_equal(tokens, counts, max(counts), torch.tensor(counts).cumsum(0), None, rows, bonus, metadata).tolist()


@pytest.mark.parametrize("temperature", [[0.0] * 4, [1.0] * 4, [0.0, 1.0, 1.0, 0.0]], ids=["greedy", "random", "mixed"])
def test_rows_get_the_token_of_a_plain_step(temperature):
    rows, wanted, bonus, metadata, counts = step(temperature)
    last = bonus.view(-1).tolist()
    all_right = [[*wanted[:3], last[0]], [last[1], -1, -1, -1], [*wanted[3:5], last[2], -1], [wanted[5], last[3], -1, -1]]
    assert accept(rows, wanted, bonus, metadata, counts) == all_right
    # A wrong draft is replaced by the target's own token, and ends the step.
    assert accept(rows, wanted, bonus, metadata, counts, wrong={1, 3, 5}) == [
        [wanted[0], wanted[1], -1, -1], [last[1], -1, -1, -1], [wanted[3], -1, -1, -1], [wanted[5], -1, -1, -1]]  # fmt: skip


@pytest.mark.parametrize("wrong", [(), (1, 3, 5)])
def test_the_second_runners_rows(monkeypatch, wrong):
    """accept_equal_rows on its layout: a request's rows one behind another, a draft behind each but the last. Noise is the runner's own."""
    from tpinv.integrations.vllm.speculation import accept_equal_rows

    own = torch.tensor([7, 8, 9, 4, 5, 6, 7, 8, 3, 2], dtype=torch.int64)  # of 3, 0, 2 and 1 drafts
    starts, drafts = torch.tensor([0, 4, 5, 8, 10], dtype=torch.int32), torch.zeros(10, dtype=torch.int64)
    places = [0, 1, 2, 5, 6, 8]  # rows that a draft follows
    for i, row in enumerate(places):
        drafts[row + 1] = own[row] + (i in wrong)
    fake = types.SimpleNamespace(gumbel_sample=lambda logits, *_, apply_temperature, use_fp64: logits.argmax(-1))
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.sample.gumbel", fake)
    logits = torch.nn.functional.one_hot(own, 10).float()
    nothing = torch.zeros(10, dtype=torch.int32)
    tokens, counts = accept_equal_rows(logits, None, drafts, starts, nothing, nothing[:4], nothing, nothing, nothing.float(), nothing, 3)
    found = [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]
    assert found == ([[7, 8], [5], [6], [3]] if wrong else [[7, 8, 9, 4], [5], [6, 7, 8], [3, 2]])
    assert counts.dtype == torch.int32 and tokens.shape == (4, 4)
    with pytest.raises(ValueError, match="use_block_verification=True"):
        accept_equal_rows(
            logits, None, drafts, starts, nothing, nothing[:4], nothing, nothing, nothing.float(), nothing, 3, None, False, True
        )
    with pytest.raises(ValueError, match="watermark_key=5"):
        accept_equal_rows(
            logits,
            None,
            drafts,
            starts,
            nothing,
            nothing[:4],
            nothing,
            nothing,
            nothing.float(),
            nothing,
            3,
            contexts=None,
            watermark_key=5,
        )


def test_the_rule_of_rejection_sampling_is_another_one():
    """The twin: what keeps the distribution (Leviathan et al.) keeps drafts that plain decoding would not have drawn."""
    rows, wanted, bonus, metadata, counts = step([1.0] * 40, counts=(3,) * 40)
    probabilities, uniform = rows.softmax(-1), torch.rand(len(rows), generator=torch.Generator().manual_seed(1))
    likely = probabilities.argmax(-1)
    kept = uniform < probabilities.gather(1, likely.unsqueeze(1)).squeeze(1)
    assert (kept & (likely != torch.tensor(wanted))).any()


def test_random_requests_whose_seeds_nobody_knows():
    rows, wanted, bonus, metadata, counts = step([1.0] * 4)
    metadata.logitsprocs.argmax_invariant = []
    with pytest.raises(RuntimeError, match="before tpinv's plugin"):
        accept(rows, wanted, bonus, metadata, counts)


# -- what is refused -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(checkpoint, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("TPINV_VLLM", "")
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    arguments = {"max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True, "dtype": "bfloat16"}
    found = EngineArgs(checkpoint, speculative_config=speculative, **arguments).create_engine_config()
    monkeypatch.setenv("TPINV_VLLM", '{"leaves": 8}')
    return found


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "medusa"}, "method='medusa' is not covered"),
        ({"method": "eagle3"}, "method='eagle3' is not covered"),
        ({"method": "ngram_gpu"}, "method='ngram_gpu' is not covered"),
        ({"rejection_sample_method": "synthetic"}, "rejection_sample_method='synthetic'"),
        ({"rejection_sample_method": "block"}, "rejection_sample_method='block'"),
        ({"use_local_argmax_reduction": True}, "use_local_argmax_reduction=True"),
        ({"use_heterogeneous_vocab": True}, "use_heterogeneous_vocab=True"),
        ({"parallel_drafting": True}, "parallel_drafting=True"),
        ({"synthetic_acceptance_length": 2.0}, "synthetic_acceptance_length=2.0"),
        ({"draft_sample_method": "probabilistic"}, "draft_sample_method='probabilistic'"),
        ({"disable_padded_drafter_batch": True}, "disable_padded_drafter_batch=True"),
        ({"num_speculative_tokens_per_batch_size": [(1, 8, 3)]}, "num_speculative_tokens_per_batch_size="),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
        ({"async_scheduling": True}, "async_scheduling=True"),
    ],
)
def test_what_is_not_covered_is_refused(config, changes, match):
    from tpinv.integrations.vllm.rules import check_config

    check_config(config)
    config.speculative_config = copy.copy(config.speculative_config)
    for name, value in changes.items():
        owner = config.scheduler_config if name == "async_scheduling" else config.speculative_config
        setattr(owner, name, value)
    with pytest.raises(ValueError, match=match):
        check_config(config)


def test_the_second_runner_is_refused(config, monkeypatch):
    from tpinv.integrations.vllm.rules import check_config

    monkeypatch.setattr(type(config), "use_v2_model_runner", property(lambda self: True))
    with pytest.raises(ValueError, match="V2 model runner.*VLLM_USE_V2_MODEL_RUNNER=0"):
        check_config(config)


def test_stocks_sums_are_for_drafters_only(monkeypatch):
    from tpinv.integrations.vllm import guard, speculation

    communicator = types.SimpleNamespace(all_reduce=lambda x: x + 1)
    monkeypatch.setattr(guard, "get_tp_group", lambda: types.SimpleNamespace(device_communicator=communicator))
    guard.disarm_stock_collectives()
    with speculation.drafting():
        assert communicator.all_reduce(1) == 2
    with pytest.raises(RuntimeError, match="all_reduce"):
        communicator.all_reduce(1)
