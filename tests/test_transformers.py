"""transformers' Llama and Qwen 3 after convert: a row's bytes depend on that row alone; the stock model's do not pass the same test."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tpinv import ReductionTree
from tpinv.integrations.transformers import convert, is_converted
from tpinv.testing import assert_bitwise_equal, compare, run_ranks

KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
DTYPES = (torch.float32, torch.bfloat16)
TREE = ReductionTree(8)
TOKENS = 90


def build(kind: str, dtype: torch.dtype = torch.float32, **changes):
    torch.manual_seed(0)
    make_config, model = KINDS[kind]
    sizes = dict(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
    )
    return model(make_config(**sizes | changes)).to(dtype).eval()


def ids(batch: int = 3, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(1))


def alone(model, x):
    return torch.cat([model(row[None], use_cache=False).logits for row in x])


def padded(model, x, left: int, right: int):
    real = torch.nn.functional.pad(torch.ones_like(x), (left, right))
    tokens = torch.nn.functional.pad(x, (left, right), value=7)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=real, position_ids=positions, use_cache=False).logits
    return logits[:, left : left + x.shape[1]]


def decoded(model, x, prompt: int = 50):
    """The prompt in two chunks, then one token at a time."""
    step = model(x[:, :17], use_cache=True)
    logits, cache = [step.logits], step.past_key_values
    for first, last in [(17, prompt), *((t, t + 1) for t in range(prompt, x.shape[1]))]:
        step = model(x[:, first:last], past_key_values=cache, use_cache=True)
        logits.append(step.logits)
    return torch.cat(logits, 1)


def packed(model, x, cut: int = 40):
    """Each row is two sequences; against both computed by themselves."""
    positions = torch.cat([torch.arange(cut), torch.arange(x.shape[1] - cut)]).expand(len(x), -1)
    return model(x, position_ids=positions, use_cache=False).logits


WAYS = {
    "alone": alone,
    "padded left": lambda model, x: padded(model, x, 20, 0),
    "padded right": lambda model, x: padded(model, x, 0, 13),
    "decoded": decoded,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_depends_on_itself_alone(kind, dtype):
    model, stock, x = convert(build(kind, dtype), tree=TREE), build(kind, dtype), ids()
    whole, stock_whole = model(x, use_cache=False).logits, stock(x, use_cache=False).logits
    for name, way in WAYS.items():
        assert_bitwise_equal(way(model, x), whole, f"{kind} {dtype} {name}")
    assert compare(decoded(stock, x), stock_whole), "the stock model's decode has the bytes of its prefill: this test tells nothing"
    parts = [model(x[:, :40], use_cache=False).logits, model(x[:, 40:], use_cache=False).logits]
    assert_bitwise_equal(packed(model, x), torch.cat(parts, 1), f"{kind} {dtype} packed")


@torch.no_grad()
def test_ragged_batches_generate_what_each_prompt_generates_alone():
    model, x = convert(build("llama", torch.bfloat16), tree=TREE), ids(3, 24)
    lengths = (24, 9, 1)
    real = torch.stack([torch.nn.functional.pad(torch.ones(n, dtype=torch.long), (24 - n, 0)) for n in lengths])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(x, attention_mask=real, **options)
    for at, n in enumerate(lengths):
        one = model.generate(x[at : at + 1, -n:], attention_mask=torch.ones(1, n, dtype=torch.long), **options)
        assert one.sequences[0, n:].tolist() == together.sequences[at, 24:].tolist()
        assert_bitwise_equal(torch.stack(together.logits)[:, at], torch.stack(one.logits)[:, 0], f"prompt of {n}")


def train(rope_dtype: str = "model", shards: bool = False) -> dict:
    model = convert(build("llama", tie_word_embeddings=False), tree=TREE, rope_dtype=rope_dtype).train()
    if shards and dist.get_world_size() > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    x = ids()
    loss = model(x, labels=x, use_cache=False).loss
    loss.backward()
    full = {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), **full}


def test_fsdp_has_the_bytes_of_one_process():
    one, two = run_ranks(train, 1, "model", True)[0], run_ranks(train, 2, "model", True)[0]
    for name in one:  # FSDP averages two equal gradients, which is exact
        assert_bitwise_equal(two[name], one[name], name)


def test_loss_is_that_of_transformers_to_rounding():
    x = ids()
    ours = convert(build("qwen3", torch.float64).float(), tree=TREE)(x, labels=x).loss
    exact = build("qwen3", torch.float64)(x, labels=x).loss
    assert abs(ours.item() - exact.item()) < 1e-5


def test_rope_in_float32_differs_in_bfloat16_alone():
    x = ids()
    with torch.no_grad():
        for dtype, differs in ((torch.float32, False), (torch.bfloat16, True)):
            model, wide = (convert(build("llama", dtype), tree=TREE, rope_dtype=rope)(x).logits for rope in ("model", "float32"))
            assert bool(compare(model, wide)) == differs


def test_names_and_checkpoints_stay(tmp_path):
    stock = build("qwen3")
    model = convert(copy.deepcopy(stock), tree=TREE)
    assert is_converted(model) and not is_converted(stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is Qwen3ForCausalLM and again.config._attn_implementation != "tpinv"
    for name, value in stock.state_dict().items():
        assert_bitwise_equal(again.state_dict()[name], value, name)
    assert convert(model, tree=TREE) is model


REFUSED = {
    "attention_dropout": lambda: build("llama", attention_dropout=0.1),
    "hidden_act": lambda: build("llama", hidden_act="gelu"),
    "layer_types": lambda: build("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=0),
    "dynamic": lambda: build("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "intermediate_size": lambda: build("llama", intermediate_size=180),
    "lora_A": lambda: with_adapter(build("llama")),
    "forward hooks": lambda: with_hook(build("llama")),
    "LlamaMLPish": lambda: with_stranger(build("llama")),
}


def with_adapter(model):
    model.model.layers[0].self_attn.q_proj.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(4, 64)))
    return model


def with_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 1)
    return model


def with_stranger(model):
    class LlamaMLPish(torch.nn.Module):
        pass

    model.model.layers[1].extra = LlamaMLPish()
    return model


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_not_known_is_refused_and_nothing_changes(word):
    model = REFUSED[word]()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=word):
        convert(model, tree=TREE)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_masks_that_are_not_causal_sequences_are_refused():
    model, x = convert(build("llama"), tree=TREE), ids(1, 12)
    gap = torch.ones_like(x)
    gap[0, 5] = 0
    with pytest.raises(ValueError, match="padding between"):
        model(x, attention_mask=gap)
    with pytest.raises(ValueError, match="made elsewhere"):
        model(x, attention_mask=torch.zeros(1, 1, 12, 12))
    with pytest.raises(ValueError, match="converted with"):
        convert(model, tree=ReductionTree(4))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_changed_after_convert_is_refused(kind):
    model, x = convert(build(kind), tree=TREE), ids(1, 12)
    expected = model(x, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="was set after convert"):
        model(x)
    model.set_attn_implementation("tpinv")
    assert_bitwise_equal(model(x, use_cache=False).logits, expected)
    attention = model.model.layers[1].self_attn
    attention.v_proj = torch.nn.Linear(attention.v_proj.in_features, attention.v_proj.out_features, bias=False)
    with pytest.raises(ValueError, match="v_proj was replaced by Linear"):
        model(x)
