"""Speculative decoding on the invariant target: the tokens, log-probabilities and KV bytes of decoding without it, whatever drafts say.

A row's bytes depend neither on how many queries its request has nor on what the batch holds, so that the step which checks k drafts
computes what k + 1 plain steps compute. What is left is which drafts are accepted. vLLM keeps the target's *distribution* (rejection
sampling, which draws other numbers than plain decoding). Here every row draws the target's own token, with the noise of (seed, position)
that plain decoding has there, and a draft is kept where it is that token:

    rejection sampler, V1 and V2 runner    the longest prefix of equal ids, then the target's own token (tpinv.inference.count_equal)
    top-k, top-p of drafted rows           tpinv.inference.keep_top, as of all others
    RequestKeys                            among the logits processors, which vLLM leaves out when it speculates (V1 runner)

Rejected keys and values are overwritten by the next step, which vLLM does by itself. Drafts may come from anywhere: an n-gram of the
request, a class of the user's, a draft model or an EAGLE head with stock layers, quantised or not. Their bits decide how many steps an
answer takes, and nothing else; so a drafter is built of vLLM's own layers (but for the vocabulary, which it may share with the target),
and vLLM's sums over ranks, which are refused to the target, are allowed to it.
"""

import contextlib
import contextvars
import functools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from tpinv import inference

# What proposes drafts: the methods that are tested.
METHODS = ("ngram", "custom_class", "draft_model", "eagle")
# Settings of which only the number of steps depends. All others must stand at vLLM's default.
_OF_THE_DRAFTER = {
    "method", "model", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min", "quantization", "revision", "code_revision",
    "max_model_len", "enforce_eager", "draft_tensor_parallel_size", "draft_load_config", "draft_model_config", "draft_parallel_config",
    "target_model_config", "target_parallel_config",
}  # fmt: skip
_VOCABULARY = {"VocabParallelEmbedding", "ParallelLMHead", "LogitsProcessor"}

_drafting = contextvars.ContextVar("tpinv_drafting", default=False)


def rules(config) -> Iterator[tuple[bool, str, str]]:
    """(holds, rule and value, fix) for a VllmConfig, as rules.py has them."""
    speculative = getattr(config, "speculative_config", None)
    if speculative is None:
        return
    method = getattr(speculative, "method", None)
    yield method in METHODS, f"speculative_config: method={method!r} is not covered", f"use one of {', '.join(METHODS)}"
    for name, default in _defaults(type(speculative)).items():
        value = getattr(speculative, name, default)
        if name not in _OF_THE_DRAFTER:
            yield value == default, f"speculative_config: {name}={value!r} is not covered", f"leave it at {default!r}"
    yield (
        not config.use_v2_model_runner,
        "speculative_config in the V2 model runner: its acceptance is written, and was never run on a GPU",
        "set VLLM_USE_V2_MODEL_RUNNER=0",
    )
    asynchronous = getattr(config.scheduler_config, "async_scheduling", None)
    yield (
        asynchronous is False,
        f"speculative_config with async_scheduling={asynchronous}: a position is not known when its noise is drawn",
        "set async_scheduling=False",
    )


def _defaults(kind: type) -> dict:
    """The fields of vLLM's configuration and their defaults; those without one, or whose default is made, are None."""
    found = {}
    for name, field in getattr(kind, "__dataclass_fields__", {}).items():
        default = getattr(field.default, "default", field.default)  # pydantic's Field, or the value itself
        found[name] = default if isinstance(default, (bool, int, float, str)) else None
    return found


# -- the drafter --------------------------------------------------------------------------------------------------------------------


def is_drafting() -> bool:
    """Whether what runs or is built now belongs to the drafter."""
    return _drafting.get()


@contextlib.contextmanager
def drafting() -> Iterator[None]:
    token = _drafting.set(True)
    try:
        yield
    finally:
        _drafting.reset(token)


@contextlib.contextmanager
def building_drafter() -> Iterator[None]:
    """Layers that are made in here are vLLM's own, but for those of the vocabulary."""
    from vllm.model_executor.custom_op import op_registry_oot

    from tpinv.integrations.vllm import layers

    ours = {name: op_registry_oot.pop(name) for name in layers.REPLACED if name not in _VOCABULARY and name in op_registry_oot}
    try:
        with drafting():
            yield
    finally:
        op_registry_oot.update(ours)


def _within(context, method):
    @functools.wraps(method)
    def call(*arguments, **keywords):
        with context():
            return method(*arguments, **keywords)

    return call


def _wrap(kind: type, **contexts) -> None:
    for name, context in contexts.items():
        if name in vars(kind):
            setattr(kind, name, _within(context, vars(kind)[name]))


# -- acceptance ---------------------------------------------------------------------------------------------------------------------


def install() -> None:
    """Once a process, after sampling.install."""
    from vllm.v1.sample import logits_processor, rejection_sampler
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    from tpinv.integrations.vllm import fast, waived
    from tpinv.integrations.vllm.sampling import RequestKeys

    build = logits_processor.build_logitsprocs

    @functools.wraps(build)
    def build_logitsprocs(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs=()):
        found = build(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        if vllm_config.speculative_config and not is_pooling_model:
            found.argmax_invariant.append(RequestKeys(vllm_config, device, is_pin_memory))
        return found

    logits_processor.build_logitsprocs = build_logitsprocs
    runner = sys.modules.get("vllm.v1.worker.gpu_model_runner")  # which has imported the name, if it is here already
    if runner is not None:
        runner.build_logitsprocs = build_logitsprocs

    sample_step = rejection_sampler.RejectionSampler.forward

    def forward(self, metadata, draft_probs, logits, sampling_metadata):
        """How far the last row of a request is from its last token, its noise must know."""
        RequestKeys.drafted = metadata.num_draft_tokens
        try:
            return sample_step(self, metadata, None, logits, sampling_metadata)
        finally:
            RequestKeys.drafted = None

    rejection_sampler.RejectionSampler.forward = forward
    rejection_sampler.rejection_sample = accept_equal
    rejection_sampler.apply_top_k_top_p = inference.keep_top
    rejection_sampler.expand_batch_to_tokens = expand_to_drafts
    _wrap(SpecDecodeBaseProposer, load_model=building_drafter, propose=drafting, dummy_run=drafting)
    fast.install()
    waived.install()
    _install_second_runner()


def accept_equal(
    draft_token_ids: Tensor, num_draft_tokens: list[int], max_spec_len: int, cu_num_draft_tokens: Tensor, draft_probs, target_logits: Tensor,
    bonus_token_ids: Tensor, sampling_metadata, **others,
) -> Tensor:  # fmt: skip
    """rejection_sample of the V1 runner: T drafts of B requests, processed logits [T, V], the token after all drafts [B, 1] -> int32
    [B, max_spec_len + 1], -1 past the last token of a request. Draft probabilities do not enter."""
    _refuse_others(others, {"use_fp64_gumbel": None, "synthetic_mode": False})
    own = inference.greedy(target_logits)
    device = target_logits.device
    counts = torch.tensor(num_draft_tokens, dtype=torch.int64)
    requests = torch.arange(len(counts)).repeat_interleave(counts)
    columns = torch.arange(len(requests)) - (counts.cumsum(0) - counts)[requests]
    requests, columns, counts = (index.to(device) for index in (requests, columns, counts))
    keys = None if sampling_metadata.all_greedy else _keys(sampling_metadata.logitsprocs)
    if keys is not None:
        drawn = inference.sample(target_logits, *keys.draft_keys(num_draft_tokens))
        own = torch.where(sampling_metadata.temperature[requests] < 1e-5, own, drawn)
    tokens = torch.full((len(counts), max_spec_len + 1), -1, dtype=torch.int32, device=device)
    drafts = torch.full((len(counts), max_spec_len), -1, dtype=torch.int32, device=device)
    tokens[requests, columns] = own.to(torch.int32)
    drafts[requests, columns] = draft_token_ids.to(torch.int32)
    tokens[torch.arange(len(counts), device=device), counts] = bonus_token_ids.view(-1).to(torch.int32)
    kept = inference.count_equal(tokens, drafts, counts)
    return tokens.masked_fill_(torch.arange(max_spec_len + 1, device=device) > kept.unsqueeze(1), -1)


def _keys(processors):
    """Who knows seeds and positions. None in a warm-up, which has no processors at all."""
    from tpinv.integrations.vllm.sampling import RequestKeys

    found = [processor for processor in processors.argmax_invariant if isinstance(processor, RequestKeys)]
    if not found and [*processors.all]:
        raise RuntimeError("the runner was built before tpinv's plugin was loaded, which then does not know the seeds of random requests; "
                           "call tpinv.integrations.vllm.enable() before the LLM is made")  # fmt: skip
    return found[0] if found else None


def expand_to_drafts(x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """expand_batch_to_tokens: a request's value for each of its drafts. vLLM 0.32's own leaves memory as it found it on a CPU."""
    x = torch.where(x == replace_from, replace_to, x)
    return x.repeat_interleave(cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)), output_size=num_tokens)


def accept_equal_rows(
    target_logits: Tensor, draft_logits, draft_sampled: Tensor, cu_num_logits: Tensor, pos: Tensor, idx_mapping: Tensor,
    expanded_idx_mapping: Tensor, expanded_local_pos: Tensor, temperature: Tensor, seed: Tensor, num_speculative_steps: int,
    synthetic_conditional_rates=None, use_fp64: bool = False, use_block_verification: bool = False, **others,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """rejection_sample of the V2 runner: R rows of B requests, each but a request's last followed by a draft -> (tokens [B, steps + 1], how
    many of them count [B]). A row's own token is what the runner's sampler draws without drafts: the same call. Nothing waits for the
    device."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    given = others | {"rates": synthetic_conditional_rates, "use_block_verification": use_block_verification}
    _refuse_others(given, {"use_block_verification": False})
    own = gumbel_sample(target_logits, expanded_idx_mapping, temperature, seed, pos, apply_temperature=False, use_fp64=use_fp64)
    rows = cu_num_logits[:-1].long().unsqueeze(1) + torch.arange(num_speculative_steps + 1, device=own.device)
    counts = cu_num_logits.diff().long() - 1
    last = len(own) - 1
    tokens = own[rows.clamp(max=last)]
    drafts = draft_sampled[(rows[:, :-1] + 1).clamp(max=last)].to(tokens.dtype)
    return tokens, (inference.count_equal(tokens, drafts, counts) + 1).to(torch.int32)


def _refuse_others(given: dict, allowed: dict) -> None:
    """``allowed``: name -> the only value, None for any."""
    for name, value in given.items():
        if value is not None and not (name in allowed and allowed[name] in (None, value)):
            raise ValueError(f"the rejection sampler was given {name}={value!r}, which is not covered; leave it at vLLM's default")


def _install_second_runner() -> None:
    """The V2 runner needs Triton; where that is missing it never runs."""
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        return
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler
    from vllm.v1.worker.gpu.spec_decode.autoregressive.speculator import AutoRegressiveSpeculator
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

    rejection_sampler.rejection_sample = accept_equal_rows
    _wrap(DraftModelSpeculator, load_model=building_drafter)
    _wrap(AutoRegressiveSpeculator, propose=drafting, capture=drafting)
