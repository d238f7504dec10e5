"""Megatron's marks on parameters, attributes by which its optimizer, checkpoints and clipping know what a parameter is. nn.Parameter drops
them in a deep copy and in ``load_state_dict(assign=True)``; here they are carried over by name."""

import copy

from torch import nn


def mark_sharded(parameter: nn.Parameter, dim: int, stride: int = 1) -> None:
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, stride


class KeepsMarks:
    """Mixin for modules: parameters keep their marks (attributes that are bools or integers)."""

    def _load_from_state_dict(self, *args, **kwargs):
        marks = {name: dict(vars(parameter)) for name, parameter in self._parameters.items() if parameter is not None}
        super()._load_from_state_dict(*args, **kwargs)
        for name, values in marks.items():
            for mark, value in values.items():
                if isinstance(value, int):
                    setattr(self._parameters[name], mark, value)

    def __deepcopy__(self, memo: dict):
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for name, parameter in self._parameters.items():
            for mark, value in vars(parameter).items() if parameter is not None else ():
                if isinstance(value, int):
                    setattr(twin._parameters[name], mark, value)
        return twin
