"""Weight gradients that are added to main_grad inside backward: one fp32 addition of a product that is not rounded to the weight's dtype."""

import copy
import gc
import io
import weakref

import pytest
import torch
from hostile import hostile
from torch.utils.checkpoint import checkpoint

from tpinv import column_parallel_linear, row_parallel_linear
from tpinv.collectives import Ranks
from tpinv.ops import main_grad, products
from tpinv.ops.marks import KeepsMarks
from tpinv.testing import assert_bitwise_equal, compare
from tpinv.tree import ReductionTree

TREE, ALONE = ReductionTree(4), Ranks(None, 0, 1)
LINEARS = [column_parallel_linear, row_parallel_linear]
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")])


def parameter(dtype, layout: str = "dense", device: str = "cpu") -> torch.nn.Parameter:
    """A weight [40, 24] with a main_grad that holds an earlier sum: all of a buffer, some of its columns, or transposed."""
    weight = torch.nn.Parameter(hostile("normal", (40, 24), dtype, 1).to(device))
    before = hostile("exponents", (40, 24), torch.float32, 2).to(device)
    weight.main_grad = {"dense": before, "columns": before.repeat(1, 3)[:, 24:48], "transposed": before.t().contiguous().t()}[layout]
    weight.grad_added_to_main_grad = False
    return weight


def backward(linear, weight, fused: bool, recompute: bool | None = None, seeds=(3, 4)):
    """Two micro-batches; what DistributedDataParallel's hook does after each. ``recompute``: whether reentrantly, None: not at all."""

    def function(x):
        return linear(x, weight, tree=TREE, group=ALONE, gradient_accumulation_fusion=fused)

    for seed in seeds:
        x = hostile("normal", (30, 24), weight.dtype, seed).to(weight.device).requires_grad_()
        y = function(x) if recompute is None else checkpoint(function, x, use_reentrant=recompute)
        y.backward(hostile("normal", (30, 40), weight.dtype, seed + 10).to(weight.device))
        if weight.grad is not None and not weight.grad_added_to_main_grad:
            weight.main_grad.add_(weight.grad)
        weight.grad = None
    return weight


@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_product_is_added_unrounded(device, linear, dtype, recompute):
    expected = parameter(dtype, device=device).main_grad
    for seed in (3, 4):
        x, dy = (hostile("normal", (30, n), dtype, at).to(device) for n, at in ((24, seed), (40, seed + 10)))
        expected = expected + products.local_product(dy.t(), x, TREE, ALONE, dim=0, dtype=torch.float32)
    for layout in ("dense", "columns", "transposed"):
        fused = backward(linear, parameter(dtype, layout, device), True, recompute)
        assert fused.grad_added_to_main_grad
        assert_bitwise_equal(fused.main_grad.contiguous(), expected, layout)
    unfused = backward(linear, parameter(dtype, device=device), False)  # the twin: rounded to the weight's dtype in between
    assert not unfused.grad_added_to_main_grad
    assert bool(compare(unfused.main_grad, expected)) == (dtype != torch.float32)


@pytest.mark.parametrize("linear", LINEARS)
def test_hooks_run_and_a_frozen_weight_is_left_alone(linear):
    weight, seen = parameter(torch.bfloat16), []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append((p.grad.shape, p.grad_added_to_main_grad)))
    backward(linear, weight, True)
    assert seen == [(weight.shape, True)] * 2
    frozen = parameter(torch.bfloat16).requires_grad_(False)
    before = frozen.main_grad.clone()
    assert_bitwise_equal(backward(linear, frozen, True).main_grad, before)


@pytest.mark.parametrize("linear", LINEARS)
def test_a_weight_that_is_used_twice_in_one_backward_is_refused(linear):
    weight, x = parameter(torch.bfloat16), hostile("normal", (30, 24), torch.bfloat16, 3)

    def use():
        return linear(x, weight, tree=TREE, group=ALONE, gradient_accumulation_fusion=True)

    with pytest.raises(ValueError, match=r"used twice in one backward pass.*zero_out_wgrad"):
        (use() + use()).sum().backward()
    first, second = use(), use()  # as in a pipeline: two forwards, then their backwards
    first.sum().backward()
    second.sum().backward()


@pytest.mark.parametrize("linear", LINEARS)
def test_a_shared_weight_has_each_of_its_gradients_added(linear):
    """Tied embeddings, by Megatron's mark: every product unrounded, and its hook adds what else autograd has."""
    weight, x = parameter(torch.bfloat16), hostile("normal", (30, 24), torch.bfloat16, 3)
    weight.zero_out_wgrad, weight.main_grad = True, torch.zeros(40, 24)

    def use():
        return linear(x, weight, tree=TREE, group=ALONE, gradient_accumulation_fusion=True)

    (use() + 2 * use() + weight.square().sum()).sum().backward()
    assert weight.grad_added_to_main_grad
    dy = torch.ones(30, 40).bfloat16()
    once, twice = (products.local_product(d.t(), x, TREE, ALONE, dim=0, dtype=torch.float32) for d in (dy, 2 * dy))
    assert_bitwise_equal(weight.main_grad, twice + once)
    assert_bitwise_equal(weight.grad, 30 * 40 * 2 * weight.detach())


@pytest.mark.parametrize("linear", LINEARS)
def test_a_gradient_from_elsewhere_is_not_lost(linear):
    """A penalty in the loss, or a hook of the user's: an error in the same pass, left to Megatron's hook in one of its own."""
    weight, x = parameter(torch.bfloat16), hostile("normal", (30, 24), torch.bfloat16, 3)

    def use():
        return linear(x, weight, tree=TREE, group=ALONE, gradient_accumulation_fusion=True).sum()

    use().backward()
    for loss in (lambda: use() + weight.square().sum(), lambda: weight.square().sum() + use()):
        weight.grad = None
        with pytest.raises(ValueError, match=r"gets a gradient from elsewhere.*zero_out_wgrad"):
            loss().backward()
    weight.grad = None
    weight.square().sum().backward()
    assert not weight.grad_added_to_main_grad and weight.grad.equal(2 * weight.detach())
    use().backward()
    assert weight.grad_added_to_main_grad
    masked = parameter(torch.bfloat16)
    masked.register_hook(lambda grad: grad * 0.5)
    with pytest.raises(ValueError, match="or through a hook"):
        linear(x, masked, tree=TREE, group=ALONE, gradient_accumulation_fusion=True).sum().backward()


@pytest.mark.parametrize("linear", LINEARS)
def test_autograd_grad_changes_no_buffer(linear):
    weight, x = parameter(torch.bfloat16), hostile("normal", (30, 24), torch.bfloat16, 3).requires_grad_()
    before = weight.main_grad.clone()

    def loss(fused):
        return linear(x, weight, tree=TREE, group=ALONE, gradient_accumulation_fusion=fused).sum()

    for inputs in ([x], [weight], [x, weight]):
        for found, expected in zip(torch.autograd.grad(loss(True), inputs), torch.autograd.grad(loss(False), inputs), strict=True):
            assert_bitwise_equal(found, expected)
    loss(True).backward(inputs=[x])
    assert_bitwise_equal(weight.main_grad, before)
    loss(True).backward(inputs=[weight])
    assert compare(weight.main_grad, before) and weight.grad_added_to_main_grad


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("buffer", [None, torch.zeros(40, 24).bfloat16(), torch.zeros(24, 40)])
def test_without_a_buffer_to_add_to(linear, buffer):
    weight = parameter(torch.bfloat16)
    weight.main_grad = buffer
    with pytest.raises(ValueError, match=r"must be float32 \(40, 24\) on cpu, not .*; allocate it"):
        backward(linear, weight, True)


def test_an_empty_batch_adds_zero():
    weight = parameter(torch.bfloat16)
    weight.main_grad.fill_(-0.0)
    main_grad.add(weight, torch.zeros(0, 40).bfloat16(), torch.zeros(0, 24).bfloat16(), TREE, ALONE, dim=0)
    assert_bitwise_equal(weight.main_grad, torch.zeros(40, 24))


class Marked(KeepsMarks, torch.nn.Module):
    """As Megatron's layers: parameters keep their marks, which are numbers, in copies and when they are replaced."""

    def __init__(self):
        super().__init__()
        self.weight = parameter(torch.bfloat16)


def replaced(module: Marked, way: str) -> torch.nn.Parameter:
    """The weight after ``way``, which takes hooks and buffers off it; as an engine does, it gets a new buffer then."""
    if way == "deepcopy":
        module = copy.deepcopy(module)
    elif way == "assign":
        module.load_state_dict({"weight": parameter(torch.bfloat16).detach()}, assign=True)
    elif way == "new":
        marks = {key: value for key, value in vars(module.weight).items() if isinstance(value, int)}
        module.weight = torch.nn.Parameter(module.weight.detach().clone())
        vars(module.weight).update(marks)
    elif way == "pickle":
        buffer = io.BytesIO()
        torch.save(module, buffer)
        module = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    elif way in ("swap", "overwrite"):
        setter = getattr(torch.__future__, f"set_{way}_module_params_on_conversion")
        setter(True)
        try:
            module.to(torch.float32).to(torch.bfloat16)
        finally:
            setter(False)
    weight = module.weight
    weight.main_grad = hostile("exponents", (40, 24), torch.float32, 2)
    return weight


@pytest.mark.parametrize("way", ["kept", "deepcopy", "assign", "new", "pickle", "swap", "overwrite"])
@pytest.mark.parametrize("linear", LINEARS)
def test_a_weight_that_was_copied_or_replaced_is_guarded_as_the_first_one_was(linear, way):
    """The fault: marks go with a copy, the hook stays behind, and a gradient from elsewhere is lost without a word."""
    module, x = Marked(), hostile("normal", (30, 24), torch.bfloat16, 3)
    backward(linear, module.weight, True)
    weight = replaced(module, way)

    def use():
        return linear(x, weight, tree=TREE, group=ALONE, gradient_accumulation_fusion=True).sum()

    expected = parameter(torch.bfloat16)
    expected.data.copy_(weight.data)
    assert_bitwise_equal(backward(linear, weight, True).main_grad, backward(linear, expected, True).main_grad)
    assert weight.grad_added_to_main_grad
    weight.square().sum().backward()  # a pass of its own: left to whoever adds .grad to main_grad
    assert not weight.grad_added_to_main_grad and weight.grad.equal(2 * weight.detach())
    weight.grad = None
    with pytest.raises(ValueError, match="gets a gradient from elsewhere"):
        (use() + weight.square().sum()).backward()
    with pytest.raises(ValueError, match="used twice in one backward pass"):
        (use() + use()).backward()


def test_a_copied_mark_does_not_say_that_something_was_added():
    """In a pass with a linear whose forward ran and whose backward does not, such as a loss that is only a penalty."""
    module = Marked()
    backward(column_parallel_linear, module.weight, True)
    weight = replaced(module, "deepcopy")
    column_parallel_linear(
        hostile("normal", (30, 24), torch.bfloat16, 3), weight, tree=TREE, group=ALONE, gradient_accumulation_fusion=True
    )
    weight.square().sum().backward()
    assert not weight.grad_added_to_main_grad


def test_a_guarded_weight_is_collected():
    weight = parameter(torch.bfloat16)
    gone = weakref.ref(backward(column_parallel_linear, weight, True))
    del weight
    gc.collect()
    assert gone() is None
