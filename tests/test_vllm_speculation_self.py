"""Self-draft without an engine: who may waive the guarantee, what the scheduler and the prefix cache are told, how a step is shortened.
The engine's bytes are in test_vllm_speculation.py."""

import dataclasses
import inspect
import types

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

WAIVED = {"extra_args": {"deterministic": False}}


@pytest.mark.parametrize(
    ("given", "waived"),
    [
        (WAIVED, True),
        (
            WAIVED | {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3, "max_tokens": 7, "stop_token_ids": [4], "ignore_eos": True},
            True,
        ),
        ({}, False),
        ({"extra_args": {"deterministic": True}}, False),
        ({"extra_args": {"deterministic": 0}}, True),  # what HTTP makes of false
        ({"extra_args": {"deterministic": 0.0}}, False),
        ({"extra_args": {"deterministic": 1}}, False),
        ({"extra_args": {"deterministic": []}}, False),
        ({"extra_args": {"deterministic": None}}, False),
        ({"extra_args": {"deterministic": "false"}}, False),
        ({"extra_args": {"deterministic": False, "other": 1}}, False),
        (WAIVED | {"logprobs": 0}, False),
        (WAIVED | {"prompt_logprobs": 1}, False),
        (WAIVED | {"repetition_penalty": 1.1}, False),
        (WAIVED | {"presence_penalty": 0.1}, False),
        (WAIVED | {"frequency_penalty": 0.1}, False),
        (WAIVED | {"min_p": 0.1}, False),
        (WAIVED | {"min_tokens": 3}, False),
        (WAIVED | {"logit_bias": {3: 1.0}}, False),
        (WAIVED | {"allowed_token_ids": [3, 4]}, False),
        (WAIVED | {"bad_words": ["a"]}, False),
        (WAIVED | {"thinking_token_budget": 3}, False),
    ],
)
def test_who_waives(given, waived):
    from vllm import SamplingParams

    from tpinv.integrations.vllm.waived import is_waived

    assert is_waived(SamplingParams(**given)) is waived
    assert is_waived(None) is False


def test_who_waives_behind_the_front_end():
    """Which fills in what it has resolved."""
    from vllm import SamplingParams

    from tpinv.integrations.vllm.waived import is_waived

    params = SamplingParams(**WAIVED)
    params.update_from_generation_config({}, 2)
    if "watermarking" in params.__struct_fields__:
        params.watermarking = False
        assert is_waived(params)
        params.watermarking = True
        assert not is_waived(params)
    else:
        assert is_waived(params)


def test_who_waives_over_http():
    from vllm import SamplingParams
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    from tpinv.integrations.vllm.waived import is_waived

    for text, waived in (("false", True), ("true", False), ('"false"', False), ("0.0", False)):
        request = CompletionRequest.model_validate_json(f'{{"prompt": "a", "vllm_xargs": {{"deterministic": {text}}}}}')
        assert is_waived(SamplingParams(extra_args=request.vllm_xargs)) is waived, text


def blocks_of(params, salt=None):
    """The hashes by which the prefix cache finds a request's blocks, as the engine's core makes them."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

    init_none_hash(sha256)
    given = {
        "request_id": "r", "prompt_token_ids": [*range(70)], "mm_features": None, "sampling_params": params, "pooling_params": None,
        "arrival_time": 0.0, "lora_request": None, "cache_salt": salt, "data_parallel_rank": None,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if name in inspect.signature(EngineCoreRequest).parameters}
    return Request.from_engine_core_request(EngineCoreRequest(**given), get_request_block_hasher(32, sha256)).block_hashes


def test_the_prefix_cache_keeps_them_apart(monkeypatch):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    from tpinv.integrations.vllm import waived

    usual, quick = SamplingParams(max_tokens=3), SamplingParams(max_tokens=3, **WAIVED)
    stock = inspect.unwrap(Request.from_engine_core_request.__func__)  # another test's engine may have replaced it
    monkeypatch.setattr(Request, "from_engine_core_request", classmethod(stock))
    assert blocks_of(usual) == blocks_of(quick)  # the twin: vLLM's own cache finds the blocks of both
    waived.install()
    mine, theirs = blocks_of(usual), blocks_of(quick)
    assert len(mine) == len(theirs) == 2 and not set(mine) & set(theirs)
    assert blocks_of(quick) == theirs and blocks_of(usual) == mine
    assert blocks_of(quick, "a tenant's") not in (theirs, blocks_of(quick, "another's"))
    assert blocks_of(SamplingParams(max_tokens=3, logprobs=1, **WAIVED)) == mine


def test_slots_ahead_of_the_last_token(monkeypatch):
    """vLLM 0.32 asks its configuration, 0.26 its scheduler."""
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from tpinv.integrations.vllm import waived

    monkeypatch.setattr(Request, "from_engine_core_request", Request.__dict__["from_engine_core_request"])
    config = lambda method, name: types.SimpleNamespace(  # noqa: E731
        speculative_config=types.SimpleNamespace(method=method, model=name, use_eagle=lambda: False, uses_draft_model=lambda: False,
                                                 use_dflash=lambda: False, use_dspark=lambda: False, num_speculative_tokens=5),
        num_speculative_tokens=5,
    )  # fmt: skip
    own = config("custom_class", "tpinv.integrations.vllm.self_draft.SelfDraftFp8")
    known = config("custom_class", "tpinv.harness.vllm.drafts.KnownAnswers")
    ngram, none = config("ngram", "a model"), types.SimpleNamespace(speculative_config=None, num_speculative_tokens=0)
    if hasattr(VllmConfig, "num_lookahead_tokens"):
        monkeypatch.setattr(VllmConfig, "num_lookahead_tokens", VllmConfig.num_lookahead_tokens)
        waived.install()
        reserved = VllmConfig.num_lookahead_tokens.fget
    else:

        def build(self, vllm_config):
            self.num_spec_tokens, self.num_lookahead_tokens = vllm_config.num_speculative_tokens, 0

        monkeypatch.setattr(Scheduler, "__init__", build)
        waived.install()

        def reserved(config):
            scheduler = object.__new__(Scheduler)
            scheduler.__init__(config)
            return scheduler.num_lookahead_tokens

    assert [reserved(given) for given in (own, known, ngram, none)] == [5, 0, 0, 0]


# -- the runner ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cached:
    req_ids: list
    num_computed_tokens: list
    num_output_tokens: list


@dataclasses.dataclass
class Scheduled:
    scheduled_new_reqs: list
    scheduled_cached_reqs: Cached
    num_scheduled_tokens: dict
    total_num_scheduled_tokens: int
    scheduled_spec_decode_tokens: dict
    finished_req_ids: set


class StockRunner:
    """What vLLM's runner does of a step: here only, what it was given, and one token for each request."""

    def __init__(self):
        from tpinv.integrations.vllm.self_draft import SelfDraft

        self.drafter = object.__new__(SelfDraft)
        self.input_batch = types.SimpleNamespace(
            req_id_to_index={"a": 0, "b": 1}, token_ids_cpu=np.zeros((2, 20), np.int32), is_token_ids=np.zeros((2, 20), bool),
            num_tokens_no_spec=np.array([6, 7]),
        )  # fmt: skip
        self.requests = {name: types.SimpleNamespace(output_token_ids=[1, 2]) for name in "abc"}

    def execute_model(self, scheduler_output):
        self.given = scheduler_output

    def sample_tokens(self, grammar):
        return types.SimpleNamespace(req_ids=["a", "b", "c"], sampled_token_ids=[[90], [91, 92], [93]])


def runner():
    from tpinv.integrations.vllm.self_draft import Drafting

    found = type("Runner", (Drafting, StockRunner), {})()
    found.waived = {"a", "c", "d"}
    return found


def scheduled():
    drafts = {"a": [11, 12, 13], "b": [21, 22], "c": [31, 32]}
    return Scheduled([], Cached(["a", "b", "c"], [5, 6, 7], [2, 2, 2]), {"a": 4, "b": 3, "c": 3}, 10, drafts, set())


def test_a_step_computes_the_last_draft_of_a_waived_request_alone():
    mine, told = runner(), scheduled()
    mine.execute_model(told)
    assert told == scheduled()  # what the scheduler reads the answer by
    assert mine.given.num_scheduled_tokens == {"a": 1, "b": 3, "c": 1} and mine.given.total_num_scheduled_tokens == 5
    assert mine.given.scheduled_spec_decode_tokens == {"b": [21, 22]}
    assert mine.given.scheduled_cached_reqs == Cached(["a", "b", "c"], [8, 6, 9], [5, 2, 4])
    assert mine.requests["a"].output_token_ids == [1, 2, 11, 12, 13] and mine.requests["b"].output_token_ids == [1, 2]
    assert mine.requests["c"].output_token_ids == [1, 2, 31, 32]  # not in the batch, to which it comes back with all its tokens
    assert mine.input_batch.num_tokens_no_spec.tolist() == [9, 7]
    assert mine.input_batch.token_ids_cpu[0].tolist() == [0] * 6 + [11, 12, 13] + [0] * 11 and not mine.input_batch.token_ids_cpu[1].any()
    assert mine.sample_tokens(None).sampled_token_ids == [[11, 12, 13, 90], [91, 92], [31, 32, 93]]
    mine.execute_model(Scheduled([], Cached([], [], []), {}, 0, {}, {"a"}))
    assert mine.sample_tokens(None).sampled_token_ids == [[90], [91, 92], [93]] and mine.waived == {"c", "d"}


def test_a_step_without_waived_requests_is_vllms_own():
    mine, told = runner(), scheduled()
    mine.waived = set()
    mine.execute_model(told)
    assert mine.given is told and mine.sample_tokens(None).sampled_token_ids == [[90], [91, 92], [93]]


def test_who_arrives():
    from vllm import SamplingParams

    mine = runner()
    new = [
        types.SimpleNamespace(req_id=name, sampling_params=SamplingParams(**given)) for name, given in (("e", WAIVED), ("f", {}), ("d", {}))
    ]
    # d has finished, and another request of its name arrives
    mine.execute_model(Scheduled(new, Cached([], [], []), {"e": 3, "f": 3, "d": 3}, 9, {}, {"d"}))
    assert mine.waived == {"a", "c", "e"}


def test_worker_and_drafter_need_each_other():
    from tpinv.integrations.vllm.self_draft import Drafting, SelfDraft

    class Other(StockRunner):
        def __init__(self):
            super().__init__()
            self.drafter = object()

    with pytest.raises(ValueError, match=r"self_draft.Worker is for self-drafts; set speculative_config.*or leave worker_cls out"):
        type("Runner", (Drafting, Other), {})()
    config = types.SimpleNamespace(speculative_config=types.SimpleNamespace(num_speculative_tokens=3))
    with pytest.raises(RuntimeError, match=r"SelfDraft needs its own worker; set worker_cls=tpinv.integrations.vllm.self_draft.Worker"):
        SelfDraft(config).load_model(torch.nn.Linear(1, 1))


# -- what is drafted -----------------------------------------------------------------------------------------------------------------


def drafter(kind: str, most: int | None = 20):
    """Of a batch of three requests, of which the second has sampled nothing."""
    from tpinv.integrations.vllm import self_draft

    found = getattr(self_draft, kind)(types.SimpleNamespace(speculative_config=types.SimpleNamespace(num_speculative_tokens=4)))
    requests = {
        name: types.SimpleNamespace(sampling_params=types.SimpleNamespace(max_tokens=most), output_token_ids=[5, 6]) for name in "abc"
    }
    table = types.SimpleNamespace(num_blocks_per_row=np.array([8, 8, 8]), block_size=4)
    batch = types.SimpleNamespace(req_ids=["a", "b", "c"], block_table=[table])
    found.bind(types.SimpleNamespace(requests=requests, input_batch=batch, max_model_len=32, waived=set()))
    found._draft = lambda rows, ids, last, counts: [[100 + row, 101, 102, 103][: max(counts)] for row in rows]
    return found


def propose(found, lengths=(10, 8, 12)):
    tokens = np.arange(90).reshape(3, 30)
    return found.propose([[6], [], [6]], np.array(lengths), tokens)


def test_drafts_where_they_are_worth_something():
    assert propose(drafter("SelfDraft")) == [[], [], []]  # all deterministic, and drafts as dear as the target's steps
    assert propose(drafter("SelfDraftFp8")) == [[100, 101, 102, 103], [], [102, 101, 102, 103]]
    mixed = drafter("SelfDraft")
    mixed.runner.waived = {"c"}
    assert propose(mixed) == [[100, 101, 102, 103], [], [102, 101, 102, 103]]


def test_drafts_end_where_a_request_does():
    assert propose(drafter("SelfDraftFp8", most=5)) == [[100, 101], [], [102, 101]]  # 2 of 5 are there, and one comes behind the drafts
    assert propose(drafter("SelfDraftFp8", most=3)) == [[], [], []]
    assert propose(drafter("SelfDraftFp8", most=None), lengths=(29, 8, 31)) == [[100, 101], [], []]  # of 32 positions
    full = drafter("SelfDraftFp8")
    full.runner.input_batch.block_table[0].num_blocks_per_row[:] = [3, 3, 4]
    assert propose(full) == [[100, 101, 102], [], [102, 101, 102, 103]]  # the last of 10 tokens and 2 drafts in 12 slots


def test_fp8_copies_follow_the_weights():
    from tpinv.integrations.vllm import fast, layers

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = object.__new__(layers.ColumnParallelLinear)
            torch.nn.Module.__init__(self.inner)
            self.inner.weight = torch.nn.Parameter(torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)), requires_grad=False)
            self.lm_head = None

        def load_weights(self, weights):
            self.inner.weight.copy_(weights)
            return {"inner.weight"}

    target, found = Model(), drafter("SelfDraftFp8")
    found.load_model(target)
    rounded, scale = target.inner.fast_weight
    torch.testing.assert_close(rounded.float() * scale, target.inner.weight, rtol=0.07, atol=0.01)
    assert rounded.dtype == torch.float8_e4m3fn and (rounded.float().abs().amax(1) == fast.LARGEST).all()
    assert target.load_weights(3 * target.inner.weight) == {"inner.weight"} and found.stale
    before = rounded.data_ptr()
    propose(found)
    assert not found.stale and target.inner.fast_weight[0].data_ptr() == before  # which a graph reads
    torch.testing.assert_close(rounded.float() * scale, target.inner.weight, rtol=0.07, atol=0.03)
