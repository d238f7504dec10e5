"""transformers' Llama and Qwen 3 on a GPU after convert: a row's bytes depend on that row alone; trainer's and engine's functions agree."""

import pytest
import torch

pytest.importorskip("transformers")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from test_transformers import KINDS, TREE, WAYS, alone, build, decoded, gradients, ids, packed  # noqa: E402

from tpinv import functional, inference  # noqa: E402
from tpinv.collectives import Ranks  # noqa: E402
from tpinv.integrations.transformers import convert  # noqa: E402
from tpinv.testing import assert_bitwise_equal, compare  # noqa: E402

BF16 = torch.bfloat16
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}


def on_gpu(kind: str, **changes):
    return build(kind, BF16, initializer_range=0.1, **SIZES | changes).cuda()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_depends_on_itself_alone(kind):
    model, stock, x = convert(on_gpu(kind), tree=TREE), on_gpu(kind), ids().cuda()
    whole, stock_whole = model(x, use_cache=False).logits, stock(x, use_cache=False).logits
    for name, way in WAYS.items():
        assert_bitwise_equal(way(model, x), whole, f"{kind} {name}")
    assert compare(decoded(stock, x), stock_whole), "the stock model's decode has the bytes of its prefill: this test tells nothing"
    assert_bitwise_equal(packed(model, x), torch.cat([alone(model, x[:, :40]), alone(model, x[:, 40:])], 1), f"{kind} packed")


def test_gradients_are_those_of_another_run():
    model, x = convert(on_gpu("llama"), tree=TREE), ids().cuda()
    expected = gradients(model, x)
    for name, value in gradients(model, x).items():
        assert_bitwise_equal(value, expected[name], name)


def test_frequencies_are_a_cpus_wherever_the_model_was_built():
    expected = convert(build("llama", BF16), tree=TREE).model.rotary_emb.inv_freq
    with torch.device("cuda"):
        made = build("llama", BF16)
    assert made.model.rotary_emb.inv_freq.is_cuda
    assert_bitwise_equal(convert(made, tree=TREE).model.rotary_emb.inv_freq.cpu(), expected)


def test_trainer_and_engine_have_one_function():
    """What the trainer composes and the engine computes in one launch, in any rows."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = (torch.randn(300, 2 * 1408, device="cuda", generator=generator) * 4).to(BF16)
    gate, up = x.chunk(2, -1)
    assert_bitwise_equal(functional.swiglu(x), functional.silu(gate.contiguous()) * up)
    logits = (torch.randn(300, 4096, device="cuda", generator=generator) * 3).to(BF16)
    targets = torch.randint(0, 4096, (300,), device="cuda", generator=generator)
    trainer = functional.vocab_parallel_log_probs(logits, targets, tree=TREE, group=Ranks(None, 0, 1))
    for rows in (1, 64, 300):
        engine = inference.token_log_probs(logits[:rows].float(), targets[:rows, None], TREE).squeeze(1)
        assert_bitwise_equal(engine, trainer[:rows], f"{rows} rows")
    assert compare(logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(1), trainer), "torch's would do: this tells nothing"
