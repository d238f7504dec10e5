"""Fused optimizers: Adam as a torch.optim.Optimizer of its own, element by element, and multi-tensor operations with their applier."""

import torch

from transformer_engine.pytorch.optimizers.fused_adam import FusedAdam, FusedSGD


def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(chunk_size, noop_flag, tensor_lists, scale):
    if not isinstance(scale, torch.Tensor):
        raise TypeError(f"scale is a {type(scale).__name__}, and must be a tensor")
    multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale)


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
    """float32 partial sums of chunks, whose places depend on the local shapes."""
    total = torch.zeros(1)
    for tensor in tensor_lists[0]:
        for piece in tensor.float().view(-1).split(chunk_size):
            total += piece.square().sum()
    return total.sqrt(), None


class MultiTensorApply:
    def __init__(self, chunk_size):
        self.chunk_size = chunk_size

    def __call__(self, op, noop_flag_buffer, tensor_lists, *args):
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)
__all__ = ["FusedAdam", "FusedSGD", "multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale", "multi_tensor_scale_tensor"]
