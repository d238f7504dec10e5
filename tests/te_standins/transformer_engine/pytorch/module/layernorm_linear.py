import torch
import torch.distributed as dist
from torch.nn import functional

from transformer_engine.pytorch.module.base import Product, TransformerEngineBaseModule, mark
from transformer_engine.pytorch.module.linear import Linear


class LayerNormLinear(TransformerEngineBaseModule):
    def __init__(
        self, in_features, out_features, eps=1e-5, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
        get_rng_state_tracker=None, init_method=None, bias=True, normalization="LayerNorm", return_bias=False, params_dtype=None,
        parallel_mode=None, return_layernorm_output=False, return_layernorm_output_gathered=False, parameters_split=None,
        zero_centered_gamma=False, device="cuda", ub_overlap_ag=False, ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_wgrad=False,
        ub_bulk_dgrad=False, ub_name=None, delay_wgrad_compute=False, symmetric_ar_type=None, name=None,
    ):  # fmt: skip
        super().__init__(name)
        self.in_features, self.out_features, self.eps = in_features, out_features, eps
        self.fuse_wgrad_accumulation, self.normalization = fuse_wgrad_accumulation, normalization
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.return_layernorm_output, self.zero_centered_gamma = return_layernorm_output, zero_centered_gamma
        self.symmetric_ar_type = symmetric_ar_type
        self.tp_size = tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.set_tensor_parallel_group(tp_group)
        self.parallel_mode = parallel_mode
        if parallel_mode == "column":
            self.out_features //= self.tp_size
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel

        def norm_parameter(init_fn):
            return {"param": torch.nn.Parameter(torch.empty(in_features, device=device, dtype=params_dtype)), "init_fn": init_fn}

        self.register_parameter("layer_norm_weight", **norm_parameter(torch.nn.init.zeros_ if zero_centered_gamma else torch.nn.init.ones_))
        if normalization != "RMSNorm":
            self.register_parameter("layer_norm_bias", **norm_parameter(torch.nn.init.zeros_))
        else:
            self.layer_norm_bias = None
        Linear._linear_parameters(self, device, params_dtype, init_method, get_rng_state_tracker)
        self.reset_parameters(defer_init=device == "meta")

    def reset_parameters(self, defer_init=False):
        super().reset_parameters(defer_init)
        if defer_init:
            return
        for norm in (self.layer_norm_weight, self.layer_norm_bias):
            if norm is not None:
                norm.sequence_parallel = self.sequence_parallel
        mark(self.weight, 0)
        if self.use_bias:
            mark(self.bias, 0)

    def forward(self, inp, is_first_microbatch=None):
        shape = (self.in_features,)
        weight = self.layer_norm_weight + 1 if self.zero_centered_gamma else self.layer_norm_weight
        if self.normalization == "RMSNorm":
            normed = functional.rms_norm(inp, shape, weight, self.eps)
        else:
            normed = functional.layer_norm(inp, shape, weight, self.layer_norm_bias, self.eps)
        out = Product.apply(normed, self.weight, self.bias if self.apply_bias else None, self)
        return (out, self.bias) if self.return_bias else out
