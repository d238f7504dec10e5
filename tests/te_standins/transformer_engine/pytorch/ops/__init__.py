"""Fusible operations, of which the norms are two: modules of another base class than the linears."""

import torch
from torch.nn import functional


class FusibleOperation(torch.nn.Module):
    pass


class BasicOperation(FusibleOperation):
    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        pass


class RMSNorm(BasicOperation):
    def __init__(self, normalized_shape, *, eps=1e-5, device=None, dtype=None, zero_centered_gamma=False, sm_margin=0):
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        shape = tuple(normalized_shape) if hasattr(normalized_shape, "__iter__") else (normalized_shape,)
        self._shape = shape
        self._make("weight", device, dtype)
        self.reset_parameters()
        self._sm_margins = {"forward": sm_margin, "backward": sm_margin, "inference": sm_margin}

    def _make(self, name, device, dtype):
        self.register_parameter(name, torch.nn.Parameter(torch.empty(self._shape, device=device, dtype=dtype)))

    def reset_parameters(self):
        torch.nn.init.zeros_(self.weight) if self.zero_centered_gamma else torch.nn.init.ones_(self.weight)

    def forward(self, x):
        return functional.rms_norm(x, self._shape, self.weight + 1 if self.zero_centered_gamma else self.weight, self.eps)


class LayerNorm(RMSNorm):
    def _make(self, name, device, dtype):
        super()._make(name, device, dtype)
        super()._make("bias", device, dtype)

    def reset_parameters(self):
        super().reset_parameters()
        torch.nn.init.zeros_(self.bias)

    def forward(self, x):
        return functional.layer_norm(x, self._shape, self.weight + 1 if self.zero_centered_gamma else self.weight, self.bias, self.eps)


class MakeExtraOutput(BasicOperation):
    pass


class Sequential(torch.nn.Sequential):
    pass
