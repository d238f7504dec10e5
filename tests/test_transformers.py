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
    positions = torch.cat([torch.arange(cut), torch.arange(x.shape[1] - cut)]).expand(len(x), -1).to(x.device)
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


def test_the_padding_row_gets_no_gradient():
    x = ids()
    x[:, ::5] = 7
    grads = []
    for model in (build("llama", pad_token_id=7), convert(build("llama", pad_token_id=7), tree=TREE)):
        assert model.model.embed_tokens.padding_idx == 7
        model(x, labels=x, use_cache=False).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad)
    assert not grads[1][7].any() and grads[1].any()
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-6)


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
    "forward of its own": lambda: with_forward(build("llama")),
    "LlamaMLPish": lambda: with_stranger(build("llama")),
}


def with_adapter(model):
    model.model.layers[0].self_attn.q_proj.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(4, 64)))
    return model


def with_forward(model):
    own_forward("model.layers.0.mlp")(model)
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


def exchange(path: str, make):
    def change(model):
        parent, _, name = path.rpartition(".")
        old = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, make(old))

    return change


class OtherMLP(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Adapter(torch.nn.Module):
    """As adapters do: the layer is kept inside."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.lora_A = base_layer, torch.nn.Linear(base_layer.in_features, 4, bias=False)

    def forward(self, x):
        return self.base_layer(x)


def own_forward(path: str):
    def change(model):
        module = model.get_submodule(path)
        module.forward = type(module).forward.__get__(module)

    return change


def stock_rotary(config):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config)


def other_model(old, leaves: int = 8):
    """Converted, of the same class, with rope of another base."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    kind = "qwen3" if "Qwen3" in type(old).__name__ else "llama"  # of a linear either will do
    return convert(build(kind, tie_word_embeddings=False, rope_parameters=rope), tree=ReductionTree(leaves))


stock_linear = lambda old: torch.nn.Linear(old.in_features, old.out_features, bias=False)  # noqa: E731
CHANGES = {
    "v_proj (Linear)": exchange("model.layers.1.self_attn.v_proj", stock_linear),
    "o_proj (Linear)": exchange("model.layers.1.self_attn.o_proj", stock_linear),
    "gate_proj (Linear)": exchange("model.layers.0.mlp.gate_proj", stock_linear),
    "down_proj (Linear)": exchange("model.layers.0.mlp.down_proj", stock_linear),
    "lm_head (Linear)": exchange("lm_head", stock_linear),
    "embed_tokens (Embedding)": exchange("model.embed_tokens", lambda old: torch.nn.Embedding(*old.weight.shape)),
    "norm (RMSNorm)": exchange("model.norm", lambda old: torch.nn.RMSNorm(64)),
    "input_layernorm": exchange("model.layers.1.input_layernorm", lambda old: type(old).__mro__[2](64)),
    "act_fn (SiLU)": exchange("model.layers.1.mlp.act_fn", lambda old: torch.nn.SiLU()),
    "mlp (OtherMLP)": exchange("model.layers.1.mlp", OtherMLP),
    "up_proj (Adapter)": exchange("model.layers.1.mlp.up_proj", Adapter),
    "layers.1 (Identity)": exchange("model.layers.1", lambda old: torch.nn.Identity()),
    "lm_head (Linear) ": lambda model: model.resize_token_embeddings(320),
    "forward of its own": own_forward("model.layers.0.mlp"),
    "forward of its own ": own_forward("model.layers.1.input_layernorm"),
    "has the hook": lambda model: model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 1),
    "has the hook ": lambda model: model.lm_head.register_forward_pre_hook(lambda module, inputs: inputs),
    "rotary_emb (LlamaRotaryEmbedding)": exchange("model.rotary_emb", lambda old: stock_rotary(old.config)),
    "rotary_emb (TPInvariantLlamaRotaryEmbedding) comes from elsewhere": exchange("model.rotary_emb", lambda old: type(old)(old.config)),
    "its config is not": exchange("model.rotary_emb", lambda old: other_model(old).model.rotary_emb),
    "its config is not ": exchange("model.layers.1.self_attn", lambda old: other_model(old.q_proj).model.layers[1].self_attn),
    "has variance_epsilon": lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 1e-3),
    "has scaling": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 1.0),
    "its tree is": exchange("model.layers.0.mlp.down_proj", lambda old: other_model(old, 16).model.layers[0].mlp.down_proj),
    "loss_function is": lambda model: setattr(model, "loss_function", torch.nn.functional.cross_entropy),
}


@pytest.mark.parametrize("message", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exchanged_after_convert_is_refused(kind, message):
    model, x = convert(build(kind, tie_word_embeddings=False), tree=TREE), ids(1, 12)
    model(x)
    CHANGES[message](model)
    with pytest.raises(ValueError, match="changed after convert") as error:
        model(x)
    assert message.strip().replace("TPInvariantLlama", f"TPInvariant{kind.title()}") in str(error.value)
    if not message.startswith(("lm_head", "loss_function")) and "pre_hook" not in message and message != "has the hook ":
        with pytest.raises(ValueError, match="changed after convert"):
            model.base_model(x)


def test_a_vocabulary_resized_after_convert_is_refused():
    """Of tied heads no module is exchanged, and 320 rows have leaves as 256 have."""
    model, x = convert(build("llama", tie_word_embeddings=True), tree=TREE), ids(1, 12)
    model.resize_token_embeddings(320)
    for part in (model, model.base_model):
        with pytest.raises(ValueError, match="embed_tokens .* has 320 rows, and convert found 256"):
            part(x)
    resized = build("llama", tie_word_embeddings=True)
    resized.resize_token_embeddings(320)
    assert convert(resized, tree=TREE)(x).logits.shape[-1] == 320


def test_frequencies_are_those_of_the_config():
    rounded = build("llama").bfloat16()
    exact = convert(build("llama", torch.bfloat16), tree=TREE).model.rotary_emb.inv_freq
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.bfloat16 and exact.dtype == torch.float32
    rounded.model.rotary_emb.inv_freq = rounded.model.rotary_emb.inv_freq.float() * (1 + 2**-20)  # as powers of another device are
    assert_bitwise_equal(convert(rounded, tree=TREE).model.rotary_emb.inv_freq, exact)
    other = build("llama")
    other.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(ValueError, match="other frequencies than those of the config"):
        convert(other, tree=TREE)


def test_the_conversion_survives(tmp_path):
    """What changes nothing, and what makes a new model: the same bytes, or a model that is not converted and says so."""
    model, x = convert(build("llama", torch.bfloat16, tie_word_embeddings=True), tree=TREE), ids(2, 40)
    expected = model(x, use_cache=False).logits
    model.tie_weights()
    model.to("cpu").requires_grad_(True)
    assert_bitwise_equal(copy.deepcopy(model)(x, use_cache=False).logits, expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not is_converted(again)
    assert_bitwise_equal(convert(again, tree=TREE)(x, use_cache=False).logits, expected)
    with pytest.raises(ValueError, match="rope's frequencies in torch.bfloat16"):
        copy.deepcopy(model).bfloat16()(x)
    seen = []
    model(x, output_hidden_states=True)  # transformers' own hooks
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ValueError, match="has the hook"):
        model(x)
    handle.remove()
    for whole in (True, False):
        with pytest.raises(Exception, match="torch.compile rounds"):
            torch.compile(model, backend="eager", fullgraph=whole)(x)
    assert_bitwise_equal(model(x, use_cache=False).logits, expected)


def gradients(model, x) -> dict:
    model.train().zero_grad()
    model(x, labels=x, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_checkpointing_has_the_same_gradients():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, x = convert(build("llama", torch.bfloat16), tree=TREE), ids(2, 40)
    expected = gradients(model, x)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    for name, value in gradients(model, x).items():
        assert_bitwise_equal(value, expected[name], name)
    model.gradient_checkpointing_disable()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, type(model.model.layers[0])))
    for name, value in gradients(model, x).items():
        assert_bitwise_equal(value, expected[name.replace("_checkpoint_wrapped_module.", "")], name)


@torch.no_grad()
def test_caches_and_assistants_generate_the_same():
    model, x = convert(build("llama", torch.bfloat16), tree=TREE), ids(1, 20)
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(x, **options)
    static = model.generate(x, cache_implementation="static", disable_compile=True, **options)
    looked_up = model.generate(x, prompt_lookup_num_tokens=3, **options)
    assisted = model.generate(x, assistant_model=convert(build("llama", torch.bfloat16, num_hidden_layers=1), tree=TREE), **options)
    for name, other in {"static": static, "prompt lookup": looked_up, "assisted": assisted}.items():
        assert other.sequences.tolist() == plain.sequences.tolist(), name
    assert_bitwise_equal(torch.stack(static.logits), torch.stack(plain.logits), "static")


def test_a_forward_that_was_replaced_underneath_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    model, x = convert(build("llama"), tree=TREE), ids(1, 12)
    stock = modeling_llama.apply_rotary_pos_emb

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        return stock(q, k, cos, sin, unsqueeze_dim)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    with pytest.raises(ValueError, match="apply_rotary_pos_emb was replaced"):
        model(x)
    with pytest.raises(ValueError, match="apply_rotary_pos_emb was replaced"):
        convert(build("llama"), tree=TREE)
