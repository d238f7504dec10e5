import torch
import torch.distributed as dist

from transformer_engine.pytorch.module.base import Product, TransformerEngineBaseModule, mark


class Linear(TransformerEngineBaseModule):
    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
        get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False, params_dtype=None,
        parallel_mode=None, parameters_split=None, device="cuda", ub_overlap_ag=False, ub_overlap_rs=False, ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False, ub_bulk_wgrad=False, ub_name=None, delay_wgrad_compute=False, symmetric_ar_type=None,
        save_original_input=False, name=None,
    ):  # fmt: skip
        super().__init__(name)
        self.in_features, self.out_features = in_features, out_features
        self.fuse_wgrad_accumulation, self.use_bias, self.return_bias = fuse_wgrad_accumulation, bias, return_bias
        self.apply_bias = bias and not return_bias
        self.save_original_input, self.symmetric_ar_type = save_original_input, symmetric_ar_type
        self.tp_size = tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.set_tensor_parallel_group(tp_group)
        self.parallel_mode = parallel_mode
        if parallel_mode == "column":
            self.out_features //= self.tp_size
        elif parallel_mode == "row":
            self.in_features //= self.tp_size
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self._linear_parameters(device, params_dtype, init_method, get_rng_state_tracker)
        self.reset_parameters(defer_init=device == "meta")

    def _linear_parameters(self, device, dtype, init_method, tracker) -> None:
        self.weight_names, self.bias_names = ["weight"], ["bias"]
        weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        self.register_parameter("weight", weight, init_fn=init_method, get_rng_state_tracker=tracker)
        if self.use_bias:
            bias = torch.nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))
            self.register_parameter("bias", bias, init_fn=torch.nn.init.zeros_)
        else:
            self.bias = torch.empty(0, device=device, dtype=dtype)

    def reset_parameters(self, defer_init=False):
        super().reset_parameters(defer_init)
        if defer_init:
            return
        mark(self.weight, 1 if self.parallel_mode == "row" else 0)
        if self.use_bias and self.parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel
        elif self.use_bias and self.parallel_mode == "column":
            mark(self.bias, 0)

    def forward(self, inp, is_first_microbatch=None):
        out = Product.apply(inp, self.weight, self.bias if self.apply_bias else None, self)
        return (out, self.bias) if self.return_bias else out


class GroupedLinear(TransformerEngineBaseModule):
    """Experts': named by Megatron-Core, built by no dense model."""
