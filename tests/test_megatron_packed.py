"""Packed sequences (PackedSeqParams, thd) in a Megatron GPT: the same bytes at every size, and in core attention those of a sequence alone."""

import functools
import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")

import megatron_jobs as jobs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from tpinv.harness.megatron.verify import Run, real_text
from tpinv.integrations.megatron import convert
from tpinv.testing import assert_bitwise_equal, compare

pytestmark = pytest.mark.megatron

LLAMA = Run("tpinv", 1, False, (1, 2, 4), variant="llama", qk_norm=True, num_layers=2)
RUNS = {"llama": LLAMA, "llama, bf16, recomputed": replace(LLAMA, dtype="bf16", recompute=True), "gpt": replace(LLAMA, variant="gpt")}
TOKENS, LENGTHS = 96, [31, 1, 0, 38, 20]
STARTS = [0, 32, 35, 35, 75, TOKENS]  # and, but for padding, ends


def pack(padded: bool) -> PackedSeqParams:
    cu, first = (torch.tensor(values, dtype=torch.int32) for values in ([0, *itertools.accumulate(LENGTHS)], STARTS))
    if not padded:
        cu = first
    return PackedSeqParams(
        "thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=40, max_seqlen_kv=40, cu_seqlens_q_padded=first, cu_seqlens_kv_padded=first
    )


class StockBySequence(DotProductAttention):
    """The stock module, which refuses packs, on one sequence after the other."""

    def forward(self, query, key, value, attention_mask, packed_seq_params, **_):
        context = torch.zeros(len(query), query.shape[1] * query.shape[2], dtype=query.dtype)
        cu = packed_seq_params.cu_seqlens_q.tolist()
        for start, end in zip(cu, cu[1:], strict=False):
            if start < end:
                context[start:end] = super().forward(*(t[start:end].unsqueeze(1) for t in (query, key, value)), None).squeeze(1)
        return context


def packed_step(run: Run, layers: str, padded: bool) -> dict:
    """Logits, losses and gradients of one forward and backward."""
    model = jobs.unconverted(run)
    if layers == "tpinv":
        convert(model, tree=run.tree)
    else:
        for layer in model.decoder.layers:
            layer.self_attention.core_attention.__class__ = StockBySequence
    text = real_text()[: TOKENS + 1]
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(pack(padded).cu_seqlens_q_padded.tolist())])
    inputs, packed = (text[None, :-1], positions[None], None), {"packed_seq_params": pack(padded)}
    loss = model(*inputs, labels=text[None, 1:], **packed)
    loss.mean().backward()
    with torch.no_grad():
        logits = torch.cat(jobs.gathered(model(*inputs, **packed)), -1)
    gradients = jobs.whole(model, "grad", replicas=layers == "tpinv")
    return {"logits": logits, "loss": loss.detach(), **{f"grad/{name}": tensor for name, tensor in gradients.items()}}


@pytest.fixture(scope="module")
def step(megatron_pool):
    @functools.cache
    def step(name, layers, tp=1, sp=False, padded=False):
        run = replace(RUNS[name], tp=tp, sequence_parallel=sp)
        return megatron_pool.run(jobs.in_megatron, tp, packed_step, tp, run, layers, padded)

    return step


@pytest.mark.parametrize("tp, sp", [(2, False), (4, True), (4, False)])
@pytest.mark.parametrize(
    "name, padded", [("llama", False), ("llama, bf16, recomputed", True), pytest.param("gpt", False, marks=pytest.mark.one_version)]
)
def test_the_same_bytes(name, padded, tp, sp, step):
    alone = step(name, "tpinv", padded=padded)[0]
    assert len(alone) > 20 and all(tensor.any() for tensor in alone.values())
    for found in step(name, "tpinv", tp, sp, padded):
        assert not {tensor: str(d) for tensor in alone if (d := compare(found[tensor], alone[tensor]))}


@pytest.mark.one_version
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt", marks=pytest.mark.one_version)])
def test_stock_differs(name, step):
    alone, found = step(name, "stock")[0], step(name, "stock", 4)[0]
    assert alone.keys() == step(name, "tpinv")[0].keys()
    assert sum(bool(compare(found[tensor], alone[tensor])) for tensor in alone) > len(alone) / 2


def attention_of(run: Run):
    return convert(jobs.unconverted(run), tree=run.tree).decoder.layers[0].self_attention.core_attention


def pack_and_alone(run: Run, padded: bool) -> list:
    """Rows of each sequence with what they have in the pack and alone: output and gradients."""
    attention, packed = attention_of(run), pack(padded)
    generator = torch.Generator().manual_seed(0)
    heads, groups = attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition
    q, k, v, dout = (torch.randn(TOKENS, n, 16, generator=generator) for n in (heads, groups, groups, heads))

    def run_on(dout, *inputs, **packed):
        inputs = [t.clone().requires_grad_() for t in inputs]
        out = attention(*inputs, None, **packed)
        return out.detach(), *torch.autograd.grad(out, inputs, dout)

    whole = run_on(dout.flatten(1), q, k, v, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)
    results = []
    for start, length in zip(STARTS, packed.cu_seqlens_q.diff().tolist(), strict=False):
        rows = slice(start, start + length)
        if length:
            alone = run_on(dout[rows].flatten(1).unsqueeze(1), *(t[rows].unsqueeze(1) for t in (q, k, v)))
            results.append([(a[rows].clone(), b.squeeze(1)) for a, b in zip(whole, alone, strict=True)])
    return [results, whole]


@pytest.mark.parametrize("padded", [False, True])
def test_core_attention_of_a_pack_has_the_bytes_of_its_sequences_alone(padded, megatron_pool):
    results, whole = megatron_pool.run(jobs.in_megatron, 1, pack_and_alone, 1, LLAMA, padded)[0]
    assert len(results) == 4
    for pairs in results:
        for name, (packed, alone) in zip(("output", "dq", "dk", "dv"), pairs, strict=True):
            assert_bitwise_equal(packed, alone, name)
    if padded:
        gaps = [row for start, length, end in zip(STARTS, LENGTHS, STARTS[1:], strict=False) for row in range(start + length, end)]
        assert len(gaps) == TOKENS - sum(LENGTHS) and all(not t[gaps].any() for t in whole)


def refusals(run: Run) -> list[str]:
    attention, good, q = attention_of(run), pack(False), torch.zeros(TOKENS, 2, 16)
    cu = good.cu_seqlens_q
    others = {
        "thd": (None, {"packed_seq_params": PackedSeqParams("sbhd", cu_seqlens_q=cu, cu_seqlens_kv=cu)}),
        "set them": (None, {"packed_seq_params": PackedSeqParams("thd", cu_seqlens_q=cu)}),
        "attention_mask=None": (torch.zeros(1, 1, 1, 1).bool(), {"packed_seq_params": good}),
        "AttnMaskType.no_mask in": (None, {"packed_seq_params": good, "attn_mask_type": AttnMaskType.no_mask}),
        "cp_group=None": (None, {"packed_seq_params": replace(good, cp_group=SimpleNamespace(size=lambda: 2))}),
        "cu_seqlens overlap, leave the tensors": (None, {"packed_seq_params": replace(good, cu_seqlens_q_padded=cu + 1)}),
        "bias is not covered": (None, {"attention_bias": q}),
    }
    messages = []
    for expected, (mask, arguments) in others.items():
        with pytest.raises(ValueError, match=re.escape(expected)):
            attention(q, q, q, mask, **{"attn_mask_type": AttnMaskType.padding_causal, **arguments})
        messages.append(expected)
    return messages


def test_what_is_refused(megatron_pool):
    assert len(megatron_pool.run(jobs.in_megatron, 1, refusals, 1, LLAMA)[0]) == 7
