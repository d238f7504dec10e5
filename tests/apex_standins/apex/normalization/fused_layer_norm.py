import torch


class FusedLayerNormAffineFunction:
    @staticmethod
    def apply(x, weight, bias, normalized_shape, eps, memory_efficient=False):
        return torch.nn.functional.layer_norm(x, tuple(normalized_shape), weight, bias, eps)
