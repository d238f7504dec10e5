"""window_size, window_attn_skip_freq and softmax_type="off-by-one" in a Megatron GPT: what the stock module computes, at every size the same bytes."""

import functools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core")

import megatron_jobs as jobs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from tpinv.harness.megatron.verify import Run, build_config, real_text
from tpinv.integrations.megatron import convert
from tpinv.testing import assert_bitwise_equal, compare

pytestmark = pytest.mark.megatron

LLAMA = Run("tpinv", 1, False, (1, 2, 4), variant="llama", num_layers=2)
KINDS = {
    "windows": {"window_size": (6, 0), "window_attn_skip_freq": 2},  # the second layer sees everything
    "off by one": {"softmax_type": "off-by-one"},
    "both": {"window_size": (10, 0), "softmax_type": "off-by-one"},
}


def model_of(run: Run, layers: str, kind: str):
    """A GPT with these settings, converted or not. The stock module makes its offset on the current GPU."""
    config = build_config(run)
    for name, value in KINDS[kind].items():
        setattr(config, name, value)
    current = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")
    try:
        model = jobs.unconverted(run, config=config)
    finally:
        torch.cuda.current_device = current
    if layers == "tpinv":
        convert(model, tree=run.tree)
    return model


def step_of(run: Run, layers: str, kind: str) -> dict:
    """Logits, losses and gradients of one forward and backward."""
    model = model_of(run, layers, kind)
    text = real_text()[: 2 * run.sequence + 1]
    tokens, labels = text[:-1].view(2, -1), text[1:].view(2, -1)
    positions = torch.arange(run.sequence).expand(2, -1)
    loss = model(tokens, positions, None, labels=labels)
    loss.mean().backward()
    with torch.no_grad():
        logits = torch.cat(jobs.gathered(model(tokens, positions, None)), -1)
    gradients = jobs.whole(model, "grad", replicas=layers == "tpinv")
    return {"logits": logits, "loss": loss.detach(), **{f"grad/{name}": tensor for name, tensor in gradients.items()}}


@pytest.fixture(scope="module")
def step(megatron_pool):
    @functools.cache
    def step(layers, kind, tp=1, sp=False):
        run = replace(LLAMA, tp=tp, sequence_parallel=sp)
        return megatron_pool.run(jobs.in_megatron, tp, step_of, tp, run, layers, kind)

    return step


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_and_what_stock_computes(kind, step):
    alone = step("tpinv", kind)[0]
    assert len(alone) > 15 and all(tensor.any() for tensor in alone.values())
    for found in step("tpinv", kind, 4, kind == "both"):
        assert not {tensor: str(d) for tensor in alone if (d := compare(found[tensor], alone[tensor]))}
    stock = step("stock", kind)[0]
    assert (stock["logits"] - alone["logits"]).norm() <= 1e-5 * stock["logits"].norm()
    for name, tensor in stock.items():
        assert (tensor - alone[name]).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.one_version
def test_stock_differs(step):
    alone, found = step("stock", "both")[0], step("stock", "both", 4)[0]
    assert sum(bool(compare(found[tensor], alone[tensor])) for tensor in alone) > len(alone) / 2


def attend_in_layers(run: Run) -> list:
    """A pack and its sequences alone, in the layer with a window; what each layer sees; masks."""
    model = model_of(run, "tpinv", "windows")
    first, second = (layer.self_attention.core_attention for layer in model.decoder.layers)
    generator = torch.Generator().manual_seed(0)
    heads, groups = first.num_attention_heads_per_partition, first.num_query_groups_per_partition
    q, k, v = (torch.randn(40, n, 16, generator=generator) for n in (heads, groups, groups))
    cu = torch.tensor([0, 25, 40], dtype=torch.int32)
    pack = PackedSeqParams("thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=25, max_seqlen_kv=25)
    packed = first(q, k, v, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=pack)
    alone = torch.cat([first(*(t[a:b].unsqueeze(1) for t in (q, k, v)), None).squeeze(1) for a, b in ((0, 25), (25, 40))])
    changed = v.clone()
    changed[0] += 1  # seen by the first 7 rows of a window of (6, 0), by all without
    seen = [[layer(*(t.unsqueeze(1) for t in (q, k, values)), None) for values in (v, changed)] for layer in (first, second)]
    moved = [(a != b).flatten(1).any(1).tolist() for a, b in seen]
    causal = torch.ones(1, 1, 40, 40, dtype=torch.bool).triu(1)
    with_mask = first(*(t.unsqueeze(1) for t in (q, k, v)), causal)
    refusals = []
    for mask in (causal.roll(1, -1), ~causal):
        with pytest.raises(ValueError, match=r"\['sliding_window'\] and a mask that is not the causal one is not covered") as error:
            first(*(t.unsqueeze(1) for t in (q, k, v)), mask)
        refusals.append(str(error.value))
    return [packed, alone, moved, with_mask, first(*(t.unsqueeze(1) for t in (q, k, v)), None), refusals]


def test_layers_packs_and_masks(megatron_pool):
    packed, alone, moved, with_mask, without, refusals = megatron_pool.run(jobs.in_megatron, 1, attend_in_layers, 1, LLAMA)[0]
    assert_bitwise_equal(packed, alone)
    assert_bitwise_equal(with_mask, without)
    assert moved[0] == [True] * 7 + [False] * 33 and all(moved[1]) and len(refusals) == 2
