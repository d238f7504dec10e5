"""TransformerEngineBaseModule: how parameters are registered and reset, and the extra state. And the products of its linears."""

from abc import ABC, abstractmethod
from collections import namedtuple

import torch
import torch.distributed as dist

Meta = namedtuple("Meta", "init_fn get_rng_state_tracker")


def get_dummy_wgrad(shape, dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype) if zero else torch.empty(shape, dtype=dtype)


def mark(tensor, dim: int) -> None:
    tensor.tensor_model_parallel, tensor.partition_dim, tensor.partition_stride = True, dim, 1


class TransformerEngineBaseModule(torch.nn.Module, ABC):
    def __init__(self, name=None):
        super().__init__()
        self.name = name
        self.fp8 = self.fp8_calibration = self.fp8_initialized = False
        self.fp8_meta = {"fp8_checkpoint": False, "fp8_group": None}
        self.tp_group, self.tp_size, self.sequence_parallel = None, 1, False
        self.param_init_meta = {}
        self.wgrad_accumulation_and_reduce_hooks = []

    def set_tensor_parallel_group(self, tp_group) -> None:
        self.tp_group, self.tp_group_initialized = tp_group, True

    def register_parameter(self, name, param, init_fn=None, get_rng_state_tracker=None, **_) -> None:
        super().register_parameter(name, param)
        self.param_init_meta[name] = Meta(init_fn, get_rng_state_tracker)

    def reset_parameters(self, defer_init: bool = False) -> None:
        if defer_init:
            return
        for name, param in self.named_parameters(recurse=False):
            init_fn, tracker = self.param_init_meta[name]
            if tracker is None:
                init_fn(param)
            else:
                with tracker().fork():
                    init_fn(param)
            setattr(self, name, torch.nn.Parameter(param))

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        if state is not None and state.numel():
            raise RuntimeError("no scales to load in bf16")

    @abstractmethod
    def forward(self):
        pass


def gather(x, group, size: int):
    if size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def summed(x, group, size: int, scatter: bool):
    """Over the ranks, in the dtype of ``x``; of dimension 0 this rank's part."""
    if size == 1:
        return x
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x.chunk(size)[dist.get_rank(group)].clone() if scatter else x


class Product(torch.autograd.Function):
    """y = x w^T, with what the parallel mode says on both sides. Fused, dW is added to main_grad without rounding."""

    @staticmethod
    def forward(ctx, x, weight, bias, module):
        ctx.module = module
        scatter = module.sequence_parallel
        column, row = module.parallel_mode == "column", module.parallel_mode == "row"
        ctx.save_for_backward(x, weight)
        total = gather(x, module.tp_group, module.tp_size) if column and scatter else x
        y = total @ weight.t()
        if row:
            y = summed(y, module.tp_group, module.tp_size, scatter)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, dy):
        module, (x, weight) = ctx.module, ctx.saved_tensors
        group, size, scatter = module.tp_group, module.tp_size, module.sequence_parallel
        column, row = module.parallel_mode == "column", module.parallel_mode == "row"
        dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        if row and scatter:
            dy = gather(dy, group, size)
        if column and scatter:
            x = gather(x, group, size)
        dx = dy @ weight
        if column:
            dx = summed(dx, group, size, scatter)
        flat_dy, flat_x = dy.flatten(0, -2), x.flatten(0, -2)
        if module.fuse_wgrad_accumulation:
            parameter = module.weight
            parameter.main_grad.add_(flat_dy.float().t() @ flat_x.float())
            parameter.grad_added_to_main_grad = True
            return dx, get_dummy_wgrad(weight.shape, weight.dtype, getattr(parameter, "zero_out_wgrad", False)), dbias, None
        return dx, flat_dy.t() @ flat_x, dbias, None
