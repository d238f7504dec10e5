"""Apex's multi-tensor kernels."""

import torch


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
    total = torch.zeros(1)
    for tensor in tensor_lists[0]:
        for piece in tensor.float().view(-1).split(chunk_size):
            total += piece.square().sum()
    return total.sqrt(), None


def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)
