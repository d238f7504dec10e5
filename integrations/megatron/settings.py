"""Every setting of Megatron-Core that somebody has looked at, and what was found: the allowlist of guard.py, and docs/coverage.md.

A setting that is not listed here must stand at its default. A listed one may have any value (``ANY``), or its default or one of a few
others (``Only``), where the reason says what another value would change; two need more than a list (``rules`` in guard.py), which is
said here, too. Defaults are those of the installed version's own class; a name that a version does not have is no matter.
"""

from typing import NamedTuple


class Setting(NamedTuple):
    """``values``: None for any; else those that are allowed, beside the default where ``default`` is true."""

    why: str
    values: tuple | None = None
    default: bool = True


def _any(why: str, names: str) -> dict[str, Setting]:
    return {name: Setting(why) for name in names.split()}


def _off(why: str, names: str) -> dict[str, Setting]:
    """Only the default, for a known reason."""
    return {name: Setting(why, ()) for name in names.split()}


DROPOUT = Setting("dropout draws from a stream per rank", (0.0,), default=False)
RULED = "has a rule of its own (guard.py)"

MODEL = {
    # what is computed, layer by layer
    **_any(
        "shapes: every sharded dimension is cut into leaves when its module is converted",
        "num_layers hidden_size num_attention_heads ffn_hidden_size kv_channels",
    ),
    **_any("adds or removes parameters of covered modules", "add_bias_linear add_qkv_bias gated_linear_unit qk_layernorm"),
    **_any("a norm that tpinv replaces, or none that is covered; the module decides", "normalization"),
    **_any("a constant that every rank gets", "layernorm_epsilon softmax_scale"),
    **_any("products, sums and clamps element by element, exact at every width", "glu_linear_offset activation_func_clamp_value"),
    **_any("rotation element by element: the same operations at every width, fused by TransformerEngine or not", "rotary_interleaved apply_rope_fusion"),
    **_any("read by the core attention, which tpinv replaces", "apply_query_key_layer_scaling attention_softmax_in_fp32 attention_backend"),
    **_any("fused kernels of layers that tpinv replaces", "masked_softmax_fusion persist_layer_norm memory_efficient_layer_norm"),
    **_any("additions element by element, fused or not", "bias_dropout_fusion"),
    **_any("selects the layer spec; the modules that it built are looked at one by one", "transformer_impl is_hybrid_model"),
    **_any("the loss is tpinv's, fused or not", "cross_entropy_loss_fusion"),
    **_any(RULED + ": not 'linear', which bypasses the output layer", "cross_entropy_fusion_impl"),
    **_any("the loss's scale is a number that every rank gets; tokens are counted in integers", "calculate_per_token_loss"),
    **_any(RULED + ": an activation that is exact or tpinv's", "activation_func"),
    **_any(RULED + ": query groups are a multiple of the tensor-parallel size", "num_query_groups"),
    **_any(RULED + ": not with GELU and biases, nor on a CPU", "bias_activation_fusion"),
    # numbers
    **_any("the dtype of every product is its inputs'", "fp16 bf16 params_dtype pipeline_dtype"),
    **_any("read with enable_autocast alone, which is refused", "autocast_dtype"),
    **_any("a flag of torch's own products, which tpinv does not call", "disable_bf16_reduced_precision_matmul"),
    **_any("tpinv's kernels are deterministic", "deterministic_mode"),
    **_any("tpinv adds to main_grad inside backward, in fp32 and unrounded, with it and without it", "gradient_accumulation_fusion"),
    # initial values: that they do not depend on TP is the user's, and convert warns
    **_any(
        "initial values, not what is done with them",
        "perform_initialization use_cpu_initialization init_method output_layer_init_method init_method_std embedding_init_method "
        "embedding_init_method_std init_model_with_meta_device",
    ),
    # parallelism
    **_any("what tpinv is for", "tensor_model_parallel_size sequence_parallel"),
    **_any(
        "copies between stages; the sums of a stage are those of the whole model",
        "pipeline_model_parallel_size pipeline_model_parallel_comm_backend variable_seq_lengths overlap_p2p_comm batch_p2p_comm "
        "batch_p2p_sync deallocate_pipeline_outputs microbatch_group_size_per_vp_stage num_layers_in_first_pipeline_stage "
        "num_layers_in_last_pipeline_stage pipeline_model_parallel_layout account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split",
    ),
    **_any("experts are refused", "expert_tensor_parallel_size cp_comm_type"),
    **_any("the sum over ranks of layers that tpinv replaces", "async_tensor_model_parallel_allreduce"),
    # memory
    **_any(
        "the same forward once more",
        "recompute_granularity recompute_method recompute_num_layers recompute_modules num_microbatches_with_partial_activation_checkpoints",
    ),
    **_any(
        "graphs of the same kernels, main_grad's addition among them",
        "enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_use_single_mempool cuda_graph_retain_backward_graph "
        "cuda_graph_warmup_steps cuda_graph_scope cuda_graph_modules inference_cuda_graph_scope",
    ),
    **_any("copies a tensor or not", "clone_scatter_output_in_embedding"),
    # what surrounds the model
    **_any("says what is measured or logged", "timers barrier_with_L1_time config_logger_dir"),
    **_any(RULED + ": Megatron's own", "finalize_model_grads_func"),
    **_any("DistributedDataParallel's and the loss scaler's own functions", "grad_scale_func no_sync_func grad_sync_func param_sync_func"),
    **_any("seeds that dropout, which is off, and sampling read", "use_te_rng_tracker inference_rng_tracker inference_sampling_seed"),
    # known to change bits with TP, or not shown not to: the default, or nothing
    "hidden_dropout": DROPOUT,
    "attention_dropout": DROPOUT,
    **_off("fp8 scales are taken from a rank's shard", "fp8"),
    **_off("fp4 scales are taken from a rank's shard", "fp4"),
    **_off("quantisation scales are taken from a rank's shard", "quant_recipe"),
    **_off("userbuffers add chunks in an order of their own", "tp_comm_overlap"),
    **_off("deferred wgrads are accumulated in another order, by the stock layers", "defer_embedding_wgrad_compute delay_wgrad_compute"),
    **_off("autocast does not reach tpinv's products", "enable_autocast"),
    **_off("norms would pass fp32 on to linears of another dtype", "fp32_residual_connection"),
    **_off("activation offloading hooks the stock layers' autograd functions", "cpu_offloading fine_grained_activation_offloading"),
    **_off("multi-latent attention is not covered", "multi_latent_attention"),
    **_off("mixture of experts is not covered", "num_moe_experts moe_shared_expert_overlap"),
    **_off("multi-token prediction is not covered", "mtp_num_layers"),
    **_off("only softmax attention is covered", "experimental_attention_variant linear_attention_freq"),
    **_off("heterogeneous blocks are not covered", "heterogeneous_block_specs"),
    **_off("the output gate of attention is not covered", "attention_output_gate"),
    **_off("clipping of queries and keys is not covered", "qk_clip"),
    **_off("the local attention does not record its largest logit", "log_max_attention_logit"),
    **_off("the L2 norm of queries and keys is not covered", "qk_l2_norm"),
    "softmax_type": Setting("a learned offset is a parameter that is not covered", ("vanilla", "off-by-one"), default=False),
    **_any(RULED + ": (keys before a query's own, 0); TransformerEngine's attention takes none", "window_size"),
    **_any("which layers have the window, the same on every rank", "window_attn_skip_freq"),
    **_off("a fused kernel that is not covered", "fused_single_qkv_rope fused_residual_rmsnorm"),
    **_off("flash attention's schedule depends on the heads of a rank", "flash_decode"),
    **_off("they replace tpinv's linears in inference", "use_inference_optimized_layers"),
    **_off("the fused reduction adds in rank order", "inference_fuse_tp_communication symmetric_ar_type"),
    **_off("NCCL adds in an order of its own", "nccl_all_reduce_for_prefill"),
    **_off("the zero-centred gamma is not covered", "layernorm_zero_centered_gamma"),
    **_off("weight shards beside tensor parallelism are not covered", "tensor_parallel_num_weight_shards gtp_weight_remat_size"),
    **_off("TransformerEngine's operations are not covered", "use_transformer_engine_op_fuser use_te_activation_func"),
    **_off("grouped products are not covered", "use_grouped_gemm_for_dense_mlp"),
    **_off("kitchen layers are not covered", "use_kitchen"),
    **_off("batch_invariant_mode replaces aten::mm underneath tpinv's own products", "batch_invariant_mode"),
    **_off("under sequence parallelism a chunk gathers other tokens at every TP", "mlp_chunks_for_training mlp_chunks_for_prefill"),
    **_off("context parallelism is not covered", "context_parallel_size"),
    **_off("interleaved pipelines are not tested", "virtual_pipeline_model_parallel_size"),
}  # fmt: skip

DATA_PARALLEL = {
    **_any("the dtype of main_grad and of its sum over replicas", "grad_reduce_in_fp32"),
    **_any(
        "when and in which pieces replicas are added: of two, the same sum; of more, reduce_scatter_with_fp32_accumulation is asked for",
        "overlap_grad_reduce bucket_size num_buckets pad_buckets_for_high_nccl_busbw reduce_scatter_with_fp32_accumulation",
    ),
    **_any("copies of parameters", "overlap_param_gather align_param_gather preserve_fp32_weights"),
    **_any("shards Adam's state, element by element", "use_distributed_optimizer"),
    **_any("looks at gradients", "check_for_nan_in_grad check_for_large_grads"),
    **_any("a factor that every rank gets", "average_in_collective gradient_reduce_div_fusion"),
    **_off("Megatron-FSDP makes buffers of its own", "use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy"),
    **_off("fp8 and fp4 scales are taken from a rank's shard", "fp8_param_gather fp4_param_gather reuse_grad_buf_for_mxfp8_param_ag"),
    **_off("deferred wgrads are computed by the stock layers", "delay_wgrad_compute"),
}

OPTIMIZER = {
    **_any(
        "numbers that every rank gets",
        "lr min_lr decoupled_lr decoupled_min_lr weight_decay apply_wd_to_qk_layernorm loss_scale initial_loss_scale min_loss_scale "
        "loss_scale_window hysteresis adam_beta1 adam_beta2 adam_eps decoupled_weight_decay sgd_momentum clip_grad grad_norm_skip_threshold",
    ),
    **_any("the dtype of the model and of its master weights", "fp16 bf16 params_dtype"),
    **_any("read by the precision-aware optimizer alone, which is refused", "store_param_remainders"),
    **_off(
        "fp16 and fp8 states carry a scale that is taken from a rank's shard, and bf16 ones are not tested",
        "use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype",
    ),
    "optimizer": Setting("only elementwise optimizers are invariant to the shards", ("adam", "sgd")),
    **_any("shards Adam's state, element by element", "use_distributed_optimizer"),
    **_any("copies of parameters", "overlap_param_gather"),
    **_any("says what is measured or logged", "log_num_zeros_in_grad barrier_with_L1_time timers config_logger_dir"),
}

TABLES = {"TransformerConfig": MODEL, "DistributedDataParallelConfig": DATA_PARALLEL, "OptimizerConfig": OPTIMIZER}


def render_markdown() -> str:
    """The three tables for docs/coverage.md: one line for each reason."""
    lines = []
    for kind, table in TABLES.items():
        lines += [f"### {kind}", "", "| settings | allowed | because |", "|---|---|---|"]
        reasons: dict[tuple, list[str]] = {}
        for name, setting in table.items():
            reasons.setdefault((_allowed(setting), setting.why), []).append(name)
        for (allowed, why), names in reasons.items():
            lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {allowed} | {why} |")
        lines += ["| every other | its default | nobody has looked at it |", ""]
    return "\n".join(lines)


def _allowed(setting: Setting) -> str:
    if setting.values is None:
        return "any"
    values = [f"`{value!r}`" for value in setting.values]
    return ", ".join([*values, "its default"] if setting.default else values)
