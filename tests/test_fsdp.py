"""FSDP2 over data parallelism around tpinv's tensor parallelism: training with clipping gives the bytes of one rank, as the sums of two equal
gradients over the replicas have one order and halving is exact."""

import functools
import inspect
import math

import pytest
import torch
import torch.distributed as dist
from test_sharding import Net, backward, load, refusal, whole_weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tpinv import clip_grad_norm_, grad_norm
from tpinv.collectives import Ranks
from tpinv.state_dict import ShardedModule
from tpinv.testing import assert_bitwise_equal, compare, run_ranks

ALONE = Ranks(None, 0, 1)


def sharded(net: nn.Module, mesh, **options) -> nn.Module:
    """Each layer, and the rest, as models are usually wrapped."""
    for child in (net.up, net.down, net.out):
        fully_shard(child, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def wholes(net: nn.Module) -> dict[str, torch.Tensor]:
    """The whole parameters of a model under FSDP, tensor parallelism or both."""
    found = {}
    for module_name, module in net.named_modules():
        shardings = module.parameter_shardings() if isinstance(module, ShardedModule) else {}
        for name, p in module.named_parameters(recurse=False):
            tensor, s = p.detach(), shardings.get(name)
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if s is not None and s.dim is not None and s.ranks.size > 1:
                parts = [torch.empty_like(tensor) for _ in range(s.ranks.size)]
                dist.all_gather(parts, tensor.contiguous(), group=s.ranks.group)
                blocks = [part.chunk(s.stride, s.dim) for part in parts]
                tensor = torch.cat([block for each in zip(*blocks, strict=True) for block in each], s.dim)
            found[f"{module_name}.{name}".lstrip(".")] = tensor
    return found


def train(net: nn.Module, steps: int = 3) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    results = {}
    for step in range(steps):
        optimizer.zero_grad()
        backward(net, step)
        results[f"inf norm {step}"] = grad_norm(net, norm_type=math.inf)
        results[f"norm {step}"] = clip_grad_norm_(net.parameters(), 0.5)
        results[f"norm after {step}"] = grad_norm(net)
        optimizer.step()
    return results | wholes(net)


def fsdp_over_tp(dp: int, **options):
    mesh = init_device_mesh("cpu", (dp, dist.get_world_size() // dp), mesh_dim_names=("dp", "tp"))
    return train(sharded(load(Net(mesh["tp"]), whole_weights()), mesh["dp"], **options))


def fsdp_alone():
    """One dimension, tensor parallelism of one, shards that are not even on three ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    return train(sharded(load(Net(ALONE), whole_weights()), mesh))


def hybrid():
    """Copies over one dimension, shards over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return train(sharded(load(Net(ALONE), whole_weights()), mesh))


def groups_without_a_mesh():
    """tpinv's group is a ProcessGroup of its own, not one of FSDP's mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    return train(sharded(load(Net(pairs[dist.get_rank() // 2]), whole_weights()), mesh["dp"]))


def gathered():
    """A model whose modules hold gathered parameters while its optimizer holds the shards, whose norm is asked for."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = backward(sharded(load(Net(mesh["tp"]), whole_weights()), mesh["dp"]))
    parameters = list(net.parameters())
    before = grad_norm(parameters)
    for module in (net.up, net.down, net.out, net):
        module.unshard()
    return before, grad_norm(parameters, compare_replicas=False)


def test_parameters_that_are_gathered_for_a_while():
    for before, after in run_ranks(gathered, 4):
        assert_bitwise_equal(after, before)
        assert_bitwise_equal(after, run("alone")[0]["norm 0"])


def alone():
    return train(load(Net(ALONE), whole_weights()))


CASES = {
    "dp 2 x tp 2": (functools.partial(fsdp_over_tp, 2), 4),
    "dp 1 x tp 2": (functools.partial(fsdp_over_tp, 1), 2),
    "dp 2": (fsdp_alone, 2),
    "dp 4": (fsdp_alone, 4),
    "hsdp": (hybrid, 4),
    "groups without a mesh": (groups_without_a_mesh, 4),
    "not resharded after forward": (functools.partial(fsdp_over_tp, 2, reshard_after_forward=False), 4),
}


@functools.cache
def run(name: str):
    function, ranks = (alone, 1) if name == "alone" else CASES[name]
    return run_ranks(function, ranks)


@pytest.mark.parametrize("name", CASES)
def test_training_with_clipping_is_that_of_one_rank(name):
    expected = run("alone")[0]
    assert expected["norm 0"] > 0.5 and expected["norm after 0"] < 0.51, "nothing was clipped"
    for result in run(name):
        assert result.keys() == expected.keys()
        for tensor, value in expected.items():
            assert_bitwise_equal(result[tensor], value, f"{tensor}, {name}")


def stock_norm():
    """The twin: torch's clipping of the same gradients, whose norm is a norm of norms."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = backward(sharded(load(Net(mesh["tp"]), whole_weights()), mesh["dp"]))
    total = inspect.unwrap(nn.utils.get_total_norm)([p.grad for p in net.parameters()])
    return total.full_tensor()


def test_stock_norm_is_another():
    assert all(compare(norm, run("alone")[0]["norm 0"]) for norm in run_ranks(stock_norm, 4))


# -- DTensors that the model's owner made -----------------------------------------------------------------------------------------------

GRADS = {"rows": (7, 6), "columns": (5, 6), "whole": (9,)}
PLACEMENTS = {"rows": 0, "columns": 1, "whole": None}


def dtensor_parameters(mesh, change=None) -> list[nn.Parameter]:
    """Over the last dimension of ``mesh``, uneven ones too; whole over the others."""
    g = torch.Generator().manual_seed(0)
    found = []
    for name, shape in GRADS.items():
        whole = torch.randn(shape, generator=g)
        if mesh is None:
            p, p.grad = nn.Parameter(torch.zeros_like(whole)), whole
        else:
            placement = Replicate() if PLACEMENTS[name] is None else Shard(PLACEMENTS[name])
            placements = [Replicate()] * (mesh.ndim - 1) + [placement]
            p = nn.Parameter(distribute_tensor(torch.zeros_like(whole), mesh, placements))
            p.grad = distribute_tensor(whole, mesh, placements)
        found.append(p)
    return found


def norms_of_dtensors(shape):
    if shape is None:
        parameters = dtensor_parameters(None)
        return grad_norm(parameters), grad_norm(parameters, norm_type=math.inf), clip_grad_norm_(parameters, 0.5), grad_norm(parameters)
    mesh = init_device_mesh("cpu", shape)
    parameters = dtensor_parameters(mesh)
    return grad_norm(parameters), grad_norm(parameters, norm_type=math.inf), clip_grad_norm_(parameters, 0.5), grad_norm(parameters)


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2), (1, 2)])
def test_gradients_that_are_dtensors(shape):
    expected = run_ranks(norms_of_dtensors, 1, None)[0]
    for result in run_ranks(norms_of_dtensors, math.prod(shape), shape):
        for actual, value in zip(result, expected, strict=True):
            assert_bitwise_equal(actual, value, str(shape))


def partial_on_one_rank():
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial() if dist.get_rank() else Replicate()])
    return refusal(lambda: grad_norm([p]))


def replicas_in_a_mesh():
    """A replicated DTensor whose copies differ in one of two groups, and a part that differs between the replicas of an HSDP mesh."""
    mesh = init_device_mesh("cpu", (2, 2))
    parameters = dtensor_parameters(mesh)
    if dist.get_rank() == 3:
        parameters[0].grad.to_local().neg_()
    return refusal(lambda: grad_norm(parameters))


def test_dtensors_are_refused_on_every_rank():
    for said in run_ranks(partial_on_one_rank, 2):
        assert "not reduced yet" in said
    for said in run_ranks(replicas_in_a_mesh, 4):
        assert "the gradient of parameter 0 (7, 6)" in said


def mixed_precision():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = backward(sharded(load(Net(mesh["tp"]), whole_weights()), mesh["dp"], mp_policy=policy))
    return clip_grad_norm_(net.parameters(), 0.5)


def test_mixed_precision():
    """Parameters in float32, computed in bfloat16: the same on every rank, and near the norm in float32."""
    norms = run_ranks(mixed_precision, 4)
    for norm in norms:
        assert_bitwise_equal(norm, norms[0])
        torch.testing.assert_close(norm, run("alone")[0]["norm 0"], rtol=0.05, atol=0)
