"""te.pytorch.LayerNorm and RMSNorm: operations with a mark for Megatron-LM on their parameters."""

from transformer_engine.pytorch import ops


class RMSNorm(ops.RMSNorm):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        **kwargs,
    ):
        self.sequence_parallel = sequence_parallel
        normalized_shape = hidden_size if normalized_shape is None else normalized_shape  # its old name
        if params_dtype is not None:
            kwargs["dtype"] = params_dtype
        super().__init__(normalized_shape, eps=eps, zero_centered_gamma=zero_centered_gamma, **kwargs)

    def reset_parameters(self):
        super().reset_parameters()
        if self.sequence_parallel is not None:
            self.weight.sequence_parallel = self.sequence_parallel


class LayerNorm(ops.LayerNorm):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        **kwargs,
    ):
        self.sequence_parallel = sequence_parallel
        normalized_shape = hidden_size if normalized_shape is None else normalized_shape  # its old name
        if params_dtype is not None:
            kwargs["dtype"] = params_dtype
        super().__init__(normalized_shape, eps=eps, zero_centered_gamma=zero_centered_gamma, **kwargs)

    def reset_parameters(self):
        super().reset_parameters()
        if self.sequence_parallel is not None:
            self.weight.sequence_parallel = self.bias.sequence_parallel = self.sequence_parallel
