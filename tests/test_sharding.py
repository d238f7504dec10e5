"""What a parameter is a part of is the module's knowledge: whatever is done to parameters, the norm is that of p = 1, or every rank refuses."""

import copy
import functools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import prune

from tpinv import ColumnParallelLinear, ReductionTree, RMSNorm, RowParallelLinear, VocabParallelEmbedding, clip_grad_norm_, grad_norm, silu
from tpinv.collectives import Ranks, resolve
from tpinv.sharding import Sharding, find_shardings, shard
from tpinv.state_dict import ShardedModule
from tpinv.testing import assert_bitwise_equal, run_ranks

TREE = ReductionTree(8)


class Net(nn.Module):
    """Embedding, norm, gate and up as one weight of stride 2, down, and an output layer: every kind of sharding. Nothing is tied."""

    def __init__(self, group=None, device=None, dtype=None):
        super().__init__()
        options = {"group": group, "device": device, "dtype": dtype}
        self.embedding = VocabParallelEmbedding(40, 16, **options)
        self.norm = RMSNorm(16, tree=TREE, **options)
        self.up = ColumnParallelLinear(16, 64, tree=TREE, stride=2, **options)
        self.down = RowParallelLinear(32, 16, tree=TREE, **options)
        self.bare = nn.LayerNorm(16, device=device, dtype=dtype)  # of torch: whole on every rank
        self.out = ColumnParallelLinear(16, 40, tree=TREE, gather_output=True, **options)

    def forward(self, ids):
        x = self.norm(self.embedding(ids))
        gate, up = self.up(x).chunk(2, -1)
        return self.out(self.bare(x + self.down(silu(gate) * up)))


def whole_weights(seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: p.detach() for name, p in Net(Ranks(None, 0, 1)).named_parameters()}


def load(net: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Whole weights into the parts that ``net`` holds, parameter by parameter."""
    with torch.no_grad():
        for module_name, module in net.named_modules():
            shardings = module.parameter_shardings() if isinstance(module, ShardedModule) else {}
            for name, p in module.named_parameters(recurse=False):
                whole, s = weights[f"{module_name}.{name}".lstrip(".")], shardings.get(name)
                part = whole if s is None or s.dim is None else shard(whole, s.dim, s.ranks.rank, s.ranks.size, s.stride)
                p.copy_(part)
    return net


def backward(net: nn.Module, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    ids, dy = torch.randint(0, 40, (12, 2), generator=g), torch.randn(12, 2, 40, generator=g)
    y = net(ids)
    y.backward((30 * dy).to(y.dtype))
    return net


def built_on_meta() -> nn.Module:
    return load(Net(device="meta").to_empty(device="cpu"), whole_weights())


def built_by_skip_init() -> nn.Module:
    net = Net()
    net.embedding = nn.utils.skip_init(VocabParallelEmbedding, 40, 16)
    net.up = nn.utils.skip_init(ColumnParallelLinear, 16, 64, tree=TREE, stride=2)
    net.down = nn.utils.skip_init(RowParallelLinear, 32, 16, tree=TREE)
    net.norm = nn.utils.skip_init(RMSNorm, 16, tree=TREE)
    net.out = nn.utils.skip_init(ColumnParallelLinear, 16, 40, tree=TREE, gather_output=True)
    return load(net, whole_weights())


def in_bf16(name: str) -> nn.Module:
    """net.to(bfloat16) makes new parameters, or swaps what is in them, where torch.__future__ says so."""
    setting = getattr(torch.__future__, f"set_{name}")
    setting(True)
    try:
        return load(Net(), whole_weights()).to(torch.bfloat16)
    finally:
        setting(False)


def assigned() -> nn.Module:
    net = load(Net(), whole_weights())
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().clone()))
    return net


def loaded_by_assignment() -> nn.Module:
    source = load(Net(), whole_weights())
    net = Net(device="meta")
    net.load_state_dict(source.state_dict(), assign=True)
    return net


def tied() -> nn.Module:
    net = load(Net(), whole_weights())
    net.out.weight = net.embedding.weight
    return net


def frozen() -> nn.Module:
    net = load(Net(), whole_weights())
    net.up.weight.requires_grad_(False)
    net.norm.requires_grad_(False)
    return net


ROUTES = {
    "plain": lambda: load(Net(), whole_weights()),
    "to_empty": built_on_meta,
    "skip_init": built_by_skip_init,
    "overwritten in bf16": functools.partial(in_bf16, "overwrite_module_params_on_conversion"),
    "swapped in bf16": functools.partial(in_bf16, "swap_module_params_on_conversion"),
    "assigned": assigned,
    "deepcopy": lambda: copy.deepcopy(load(Net(), whole_weights())),
    "load_state_dict(assign=True)": loaded_by_assignment,
    "tied": tied,
    "frozen": frozen,
    "drawn from one seed": lambda: (torch.manual_seed(5), Net())[1],
}


def copy_with_gradients(net: nn.Module) -> nn.Module:
    """Of which the caller keeps the parameters alone."""
    twin = copy.deepcopy(net)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad
    return twin


def norms_of_routes():
    results = {}
    for route, make in ROUTES.items():
        net = backward(make())
        results[route] = {
            "parameters": grad_norm(net.parameters()),
            "module": grad_norm(net),
            "modules": grad_norm([net.up, net.down, net.embedding, net.norm, net.bare, net.out.parameters().__next__(), net.out]),
            "group": grad_norm(net, group=dist.group.WORLD if dist.get_world_size() > 1 else None),
            "inf": grad_norm(net, norm_type=math.inf),
            "one": grad_norm(net.up.weight),
            "generator": grad_norm(copy_with_gradients(net).parameters()),
            "clipped": clip_grad_norm_(net.parameters(), 0.5),
            "after": grad_norm(net),
        }
    return results


@functools.cache
def routes(p: int):
    return run_ranks(norms_of_routes, p)


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("route", ROUTES)
def test_the_norm_is_that_of_one_rank_whatever_was_done_to_the_parameters(route, p):
    alone = routes(1)[0][route]
    assert_bitwise_equal(alone["parameters"], alone["modules"])
    assert alone["parameters"] > alone["after"] > 0
    for result in routes(p):
        for name, expected in alone.items():
            assert_bitwise_equal(result[route][name], expected, f"{route}, {name}")


def test_a_norm_that_counts_shards_as_replicas_is_another():
    """The twin: what the norm was when the marks were lost."""
    net = backward(ROUTES["plain"]())
    parts = [p.grad for m in net.modules() for n, p in m.named_parameters(recurse=False)]
    halves = [g.chunk(2)[0] if g.dim() == 2 else g for g in parts]
    stock = torch.stack([g.double().norm() for g in halves]).norm().float()
    assert stock != routes(1)[0]["plain"]["parameters"]


# -- groups -----------------------------------------------------------------------------------------------------------------------


def on_a_mesh():
    """dp 2 x tp 2, the same data on both replicas: the norm without group, with it, and what other groups are."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = backward(load(Net(mesh["tp"]), whole_weights()))
    results = {"none": grad_norm(net.parameters()), "tp": grad_norm(net, group=mesh["tp"]), "inf": grad_norm(net, norm_type=math.inf)}
    for name, group in {"dp": mesh["dp"], "world": dist.group.WORLD}.items():
        try:
            grad_norm(net, group=group)
        except ValueError as error:
            results[name] = str(error)
    results["clipped"] = clip_grad_norm_(net, 0.5)
    return results


def test_a_model_on_a_mesh_needs_no_group():
    alone = routes(1)[0]["plain"]
    for result in run_ranks(on_a_mesh, 4):
        for name in ("none", "tp", "clipped"):
            assert_bitwise_equal(result[name], alone["parameters"], name)
        assert_bitwise_equal(result["inf"], alone["inf"])
        for name in ("dp", "world"):
            assert "leave group out, or pass the layers' own" in result[name]


def two_groups():
    """Attention over two ranks, the rest over four: each part once."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    small, wide = ColumnParallelLinear(8, 16, tree=TREE, group=mesh["tp"]), RowParallelLinear(16, 8, tree=TREE)
    g = torch.Generator().manual_seed(1)
    wholes = {"w": torch.randn(16, 8, generator=g), "b": torch.randn(16, generator=g), "v": torch.randn(8, 16, generator=g)}
    small.weight.grad = shard(wholes["w"], 0, mesh["tp"].get_local_rank(), 2)
    small.bias.grad = shard(wholes["b"], 0, mesh["tp"].get_local_rank(), 2)
    wide.weight.grad = shard(wholes["v"], 1, dist.get_rank(), 4)
    return grad_norm([small, wide]), wholes


def test_groups_of_two_sizes():
    for norm, wholes in run_ranks(two_groups, 4):
        one = nn.ParameterList(torch.zeros_like(whole) for whole in wholes.values())
        for p, whole in zip(one, wholes.values(), strict=True):
            p.grad = whole
        assert_bitwise_equal(norm, grad_norm(one))


# -- what is refused, on every rank ---------------------------------------------------------------------------------------------------


def refusals(*names):
    """Each in turn: what every rank is told."""
    return {name: refusal(REFUSED[name]) for name in names}


def refusal(function) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def weight_norm_forward():
    row = RowParallelLinear(16, 8, tree=TREE)
    nn.utils.parametrizations.weight_norm(row)
    row(torch.ones(2, 16 // row.ranks.size))


def with_grads(net):
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return net


def parametrized(make):
    net = Net()
    make(net)
    grad_norm(with_grads(net))


def old_weight_norm(net):
    nn.utils.weight_norm(net.down)


def adapter(net):
    net.down.lora_a = nn.Parameter(torch.zeros(4, 8))


def adapter_forward():
    net = Net()
    adapter(net)
    backward(net)


def on_one_rank(change, rank=1):
    """A change to gradients that rank 1 alone makes."""
    net = with_grads(Net())
    if dist.get_rank() == rank:
        change(net)
    grad_norm(net)


def in_float64(net):
    net.bare.double()
    net.bare.weight.grad = net.bare.weight.grad.double()


def without_gradient(net):
    net.down.bias.grad = None


def other_norm():
    grad_norm(with_grads(Net()), norm_type=2.0 if dist.get_rank() else 1.0)


def other_max_norm():
    clip_grad_norm_(with_grads(Net()), max_norm=1.0 + dist.get_rank())


def negative_max_norm():
    clip_grad_norm_(with_grads(Net()), max_norm=-1.0 * dist.get_rank() + 0.5)


class Lora(nn.Module):
    """An adapter around a layer: B is [out/p, r] by its shape, but nobody says so."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(16, 2, bias=False), nn.Parameter(torch.zeros(base.weight.shape[0], 2))

    def forward(self, x):
        return self.base(x) + self.a(x) @ self.b.t()


def lora():
    torch.manual_seed(0)
    net = Lora(ColumnParallelLinear(16, 32, tree=TREE))
    net(torch.randn(5, 16)).square().sum().backward()
    grad_norm(net)


def replica_of_another_value():
    net = with_grads(Net())
    with torch.no_grad():
        net.bare.bias += dist.get_rank()
    grad_norm(net)


def replica_of_another_sign():
    """The squares are the same."""
    net = with_grads(Net())
    net.norm.weight.grad *= 1 - 2 * dist.get_rank()
    grad_norm(net)


def not_complete():
    net = with_grads(Net())
    net.norm.weight.grad += dist.get_rank()
    grad_norm(net)


def sparse():
    net = nn.Embedding(5, 3, sparse=True)
    net(torch.tensor([1])).sum().backward()
    grad_norm(net)


def complex_gradient():
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    grad_norm(p)


def marked():
    p = nn.Parameter(torch.zeros(3))
    p.grad, p.tensor_model_parallel = torch.ones(3), True
    grad_norm(p)


def drawn_apart(kind, *sizes):
    torch.manual_seed(dist.get_rank())
    layer = kind(*sizes)
    width = sizes[0] // layer.ranks.size
    layer(torch.zeros(2, dtype=torch.long) if kind is VocabParallelEmbedding else torch.ones(2, width))


REFUSED = {
    "weight_norm, forward": weight_norm_forward,
    "weight_norm": lambda: parametrized(lambda net: nn.utils.parametrizations.weight_norm(net.up)),
    "weight_norm over the cut dimension": lambda: parametrized(lambda net: nn.utils.parametrizations.weight_norm(net.down, dim=0)),
    "spectral_norm": lambda: parametrized(lambda net: nn.utils.parametrizations.spectral_norm(net.out)),
    "orthogonal": lambda: parametrized(lambda net: nn.utils.parametrizations.orthogonal(net.out)),
    "old weight_norm": lambda: parametrized(old_weight_norm),
    "pruning": lambda: parametrized(lambda net: prune.l1_unstructured(net.up, "weight", 0.5)),
    "adapter on a layer": lambda: parametrized(adapter),
    "adapter on a layer, forward": adapter_forward,
    "float64 on one rank": lambda: on_one_rank(in_float64),
    "no gradient on one rank": lambda: on_one_rank(without_gradient),
    "another norm on one rank": other_norm,
    "another max_norm": other_max_norm,
    "negative max_norm on one rank": negative_max_norm,
    "adapter around a layer": lora,
    "replica of another value": replica_of_another_value,
    "replica of another sign": replica_of_another_sign,
    "gradient that is not complete": not_complete,
    "sparse": sparse,
    "complex": complex_gradient,
    "marked by Megatron": marked,
    "not a parameter": lambda: grad_norm([("name", nn.Parameter(torch.zeros(1)))]),
    "row drawn from two seeds": lambda: drawn_apart(functools.partial(RowParallelLinear, tree=TREE), 16, 8),
    "embedding drawn from two seeds": lambda: drawn_apart(VocabParallelEmbedding, 16, 8),
}
MESSAGES = {
    "weight_norm, forward": "does not know the parameters ['parametrizations.weight.original0', 'parametrizations.weight.original1']",
    "weight_norm": "was registered on a layer that does not know it",
    "weight_norm over the cut dimension": "was registered on a layer that does not know it",
    "spectral_norm": "was registered on a layer that does not know it",
    "orthogonal": "was registered on a layer that does not know it",
    "old weight_norm": "was registered on a layer that does not know it",
    "pruning": "was registered on a layer that does not know it",
    "adapter on a layer": "down.lora_a (RowParallelLinear.lora_a) was registered on a layer",
    "adapter on a layer, forward": "RowParallelLinear does not know the parameters ['lora_a']",
    "float64 on one rank": "float64",
    "no gradient on one rank": "parameters with gradients",
    "another norm on one rank": "norm_type=1.0 must be 2.0 or inf",
    "another max_norm": "max_norm",
    "negative max_norm on one rank": "max_norm=-0.5 must be above 0",
    "adapter around a layer": "the gradient of b: no module says that it is cut",
    "replica of another value": "the value of bare.bias: no module",
    "replica of another sign": "the gradient of norm.weight (RMSNorm.weight): no module",
    "gradient that is not complete": "the gradient of norm.weight (RMSNorm.weight): no module",
    "sparse": "make it dense",
    "complex": "complex64",
    "marked by Megatron": "carries Megatron's mark tensor_model_parallel",
    "not a parameter": "pass model or model.parameters()",
    "row drawn from two seeds": "values of bias, whole on every rank",
    "embedding drawn from two seeds": "initial values of weight, drawn whole and then cut",
}


@functools.cache
def refused(name: str):
    return run_ranks(refusals, 2, name)


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_refuses(name):
    assert REFUSED.keys() == MESSAGES.keys()
    for said in refused(name):
        assert MESSAGES[name] in said[name]


def norms_with_a_choice():
    net = with_grads(Net())
    net.norm.weight.grad += dist.get_rank()
    unasked = grad_norm(net, compare_replicas=False)
    return unasked, refusal(lambda: grad_norm(net, compare_replicas=True))


def test_replicas_are_compared_unless_it_is_declined():
    for norm, said in run_ranks(norms_with_a_choice, 2):
        assert norm > 0 and "the gradient of norm.weight" in said


def loaded_after_construction():
    """What was drawn from different seeds and then overwritten is not asked for; what was not is."""
    torch.manual_seed(dist.get_rank())
    source = Net()
    load(source, whole_weights())
    backward(source)
    torch.manual_seed(dist.get_rank())
    net = Net()
    net.load_state_dict(source.state_dict())
    backward(net)
    return grad_norm(net)


def test_weights_may_be_loaded_after_construction():
    for norm in run_ranks(loaded_after_construction, 2):
        assert_bitwise_equal(norm, routes(1)[0]["plain"]["parameters"])


# -- what a module says ---------------------------------------------------------------------------------------------------------------


class WithAdapter(ColumnParallelLinear):
    """A subclass that names its own parameter."""

    shards = {**ColumnParallelLinear.shards, "lora_b": 0}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_b = nn.Parameter(torch.zeros(self.weight.shape[0], 2))


def norm_of_a_subclass():
    torch.manual_seed(0)
    layer = WithAdapter(8, 16, tree=TREE)
    layer(torch.ones(1, 8))
    g = torch.Generator().manual_seed(0)
    layer.lora_b.grad = shard(torch.randn(16, 2, generator=g), 0, layer.ranks.rank, layer.ranks.size)
    return grad_norm(layer)


def test_a_subclass_names_its_own_parameters():
    for norm in run_ranks(norm_of_a_subclass, 4):
        assert_bitwise_equal(norm, run_ranks(norm_of_a_subclass, 1)[0])


class Misnamed(WithAdapter):
    cut: object = 2

    @property
    def shards(self):
        return {**ColumnParallelLinear.shards, "lora_b": self.cut}


@pytest.mark.parametrize("cut", [2, -1, True, "0", 1.0])
def test_a_dimension_that_a_parameter_has_not(cut):
    """The norm took any; a state dict failed with torch's own words."""
    layer = Misnamed(8, 16, tree=TREE)
    layer.cut = cut
    for asked in (grad_norm, nn.Module.state_dict):
        with pytest.raises(ValueError, match=rf"shards of Misnamed says lora_b: {cut!r}; \(16, 2\) is cut on a dimension from 0 to 1"):
            asked(layer)
    layer.cut = 0


def test_find_shardings():
    alone = Ranks(None, 0, 1)
    layer, other = ColumnParallelLinear(8, 16, tree=TREE, stride=2), nn.Linear(2, 2)
    weight, bias, unknown = find_shardings([layer.weight, layer.bias, other.weight])
    assert weight == ("ColumnParallelLinear.weight", Sharding(alone, 0, 2)) and bias.sharding == Sharding(alone, 0, 2) and unknown is None
    before = layer.weight
    layer.weight = nn.Parameter(before.detach())
    assert find_shardings([before, layer.weight])[0] == weight, "what was a part stays one"
    row = RowParallelLinear(16, 8, tree=TREE)
    row.weight = nn.Parameter(layer.weight.detach().view(8, 16))
    layer.weight = row.weight
    with pytest.raises(ValueError, match="one parameter is .* tie equal parts"):
        find_shardings([row.weight])
    assert resolve(alone) is alone


@pytest.mark.parametrize(
    "layer, message",
    [
        (lambda: ColumnParallelLinear(8, 16, tree=None), "tree=None is a NoneType; pass a ReductionTree"),
        (lambda: RowParallelLinear(16, 8, tree=8), "tree=8 is a int; pass a ReductionTree"),
        (lambda: RMSNorm(8, tree="8"), "tree='8' is a str"),
        (lambda: RMSNorm(8, -1.0, tree=TREE), "eps=-1.0 must be above 0"),
        (lambda: RMSNorm(8, 0.0, tree=TREE), "eps=0.0 must be above 0"),
        (lambda: RMSNorm(8, math.nan, tree=TREE), "eps=nan must be above 0"),
        (lambda: RMSNorm(0, tree=TREE), "hidden_size=0 must be a whole number of at least 1"),
        (lambda: ColumnParallelLinear(0, 16, tree=TREE), "in_features=0 must be"),
        (lambda: ColumnParallelLinear(8.5, 16, tree=TREE), "in_features=8.5 must be"),
        (lambda: RowParallelLinear(16, -8, tree=TREE), "out_features=-8 must be"),
        (lambda: VocabParallelEmbedding(-16, 8), "num_embeddings=-16 must be"),
        (lambda: ColumnParallelLinear(8, 24, tree=ReductionTree(4), stride=5), "must be divisible by stride=5"),
    ],
)
def test_constructors_refuse(layer, message):
    with pytest.raises(ValueError, match=message):
        layer()
