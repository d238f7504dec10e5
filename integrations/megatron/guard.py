"""What cannot be invariant, or is not shown to be, is refused before a model trains on it: rule, value, fix."""

import math

from tpinv.tree import ReductionTree


def _rules(config, tp: int):
    """(holds, rule and value, fix) for every setting that convert and the specs check. Unknown settings of other versions are None.

    gradient_accumulation_fusion is no rule: tpinv adds to main_grad inside backward with it and without it (layers.py), and only
    Megatron's own layers, such as the output layer before its conversion, want Apex for it.
    """

    def get(name, default=None):
        return getattr(config, name, default)

    groups = get("num_query_groups") or get("num_attention_heads")
    gelu_fused = bool(get("bias_activation_fusion")) and bool(get("add_bias_linear")) and not get("gated_linear_unit")
    off = [  # (setting, why it changes bits with TP or is not shown not to)
        ("hidden_dropout", "dropout draws from a stream per rank"),
        ("attention_dropout", "dropout draws from a stream per rank"),
        ("fp8", "fp8 scales are taken from a rank's shard"),
        ("fp4", "fp4 scales are taken from a rank's shard"),
        ("quant_recipe", "quantisation scales are taken from a rank's shard"),
        ("tp_comm_overlap", "userbuffers add chunks in an order of their own"),
        ("defer_embedding_wgrad_compute", "deferred wgrads are accumulated in another order"),
        ("delay_wgrad_compute", "deferred wgrads are computed by the stock layers"),
        ("enable_autocast", "autocast does not reach tpinv's products"),
        ("fp32_residual_connection", "norms would pass fp32 on to linears of another dtype"),
        ("cpu_offloading", "activation offloading hooks the stock layers' autograd functions"),
        ("fine_grained_activation_offloading", "activation offloading hooks the stock layers' autograd functions"),
        ("multi_latent_attention", "multi-latent attention is not covered"),
        ("num_moe_experts", "mixture of experts is not covered"),
        ("mtp_num_layers", "multi-token prediction is not covered"),
        ("experimental_attention_variant", "only softmax attention is covered"),
        ("linear_attention_freq", "only softmax attention is covered"),
        ("heterogeneous_block_specs", "heterogeneous blocks are not covered"),
        ("attention_output_gate", "the output gate is not covered"),
        ("qk_clip", "clipping of queries and keys is not covered"),
        ("log_max_attention_logit", "the local attention does not record its largest logit"),
        ("qk_l2_norm", "the L2 norm of queries and keys is not covered"),
        ("flash_decode", "flash attention's schedule depends on the heads of a rank"),
        ("use_inference_optimized_layers", "they replace tpinv's linears in inference"),
        ("inference_fuse_tp_communication", "the fused reduction adds in rank order"),
        ("nccl_all_reduce_for_prefill", "NCCL adds in an order of its own"),
        ("layernorm_zero_centered_gamma", "the zero-centred gamma is not covered"),
        ("symmetric_ar_type", "symmetric-memory all-reduces add in rank order"),
        ("tensor_parallel_num_weight_shards", "weight shards beside tensor parallelism are not covered"),
        ("use_transformer_engine_op_fuser", "TransformerEngine's fused operations are not covered"),
        ("use_grouped_gemm_for_dense_mlp", "grouped products are not covered"),
        ("use_kitchen", "kitchen layers are not covered"),
        ("use_te_activation_func", "TransformerEngine's activations are not covered"),
        ("batch_invariant_mode", "batch_invariant_mode replaces aten::mm underneath tpinv's own products"),
    ]
    one = [
        ("mlp_chunks_for_training", "under sequence parallelism a chunk gathers other tokens at every TP"),
        ("mlp_chunks_for_prefill", "under sequence parallelism a chunk gathers other tokens at every TP"),
        ("context_parallel_size", "context parallelism is not covered"),
        ("gtp_weight_remat_size", "weight rematerialisation is not covered"),
    ]
    for name, why in one:
        yield get(name, 1) in (None, 1), f"{name}={get(name)!r}: {why}", f"set {name}=1"
    for name, why in off:
        yield not get(name), f"{name}={get(name)!r}: {why}", f"set {name}={_off_value(get(name))}"
    yield (
        groups >= tp and groups % tp == 0,
        f"num_query_groups={groups} is not a multiple of the tensor-parallel size {tp}: dK and dV of a group would be split over ranks",
        f"use a tensor-parallel size that divides {groups}",
    )
    yield (
        get("softmax_type", "vanilla") in (None, "vanilla"),
        f"softmax_type={get('softmax_type')!r}: its offsets are not covered",
        "use 'vanilla'",
    )
    yield (
        not gelu_fused,
        "bias_activation_fusion with GELU: the fused kernel wants the bias that tpinv has added already",
        "set bias_activation_fusion=False",
    )
    yield (
        get("cross_entropy_fusion_impl") != "linear" or not get("cross_entropy_loss_fusion"),
        "cross_entropy_fusion_impl='linear' bypasses the output layer",
        "set cross_entropy_loss_fusion=False",
    )


def _off_value(value) -> str:
    return "0.0" if isinstance(value, float) else "False" if isinstance(value, bool) else "None"


def check_config(config, tree: ReductionTree, tp: int) -> None:
    """ValueError naming every setting of a TransformerConfig that keeps a model from being invariant."""
    tree.owned(0, tp)
    broken = [f"  - {rule}; {fix}" for holds, rule, fix in _rules(config, tp) if not holds]
    if broken:
        raise ValueError("this model cannot be made invariant to the tensor-parallel size:\n" + "\n".join(broken))


def padded_vocab_size(vocab_size: int, tree: ReductionTree, divisible_by: int = 128) -> int:
    """The vocabulary size to build a model with: the smallest multiple of ``divisible_by`` and of the tree's leaves.

    Megatron's own padding is to a multiple of ``make_vocab_size_divisible_by * TP``. It changes with TP, and with it the number of
    dummy logits in every softmax.
    """
    multiple = math.lcm(divisible_by, tree.leaves)
    return -(-vocab_size // multiple) * multiple


def check_vocabulary(vocab_size: int, tree: ReductionTree, tokenizer_vocab_size: int | None, divisible_by: int = 128) -> None:
    """ValueError unless the model's vocabulary has equal leaves and, when the tokenizer's size is given, does not depend on TP."""
    if vocab_size % tree.leaves:
        raise ValueError(
            f"vocab_size={vocab_size} is no multiple of leaves={tree.leaves}, so it would have to be padded, and differently at every "
            f"tensor-parallel size; build the model with {padded_vocab_size(vocab_size, tree, divisible_by)} (padded_vocab_size) at every one"
        )
    if tokenizer_vocab_size is None:
        return
    fixed = padded_vocab_size(tokenizer_vocab_size, tree, divisible_by)
    if vocab_size not in (tokenizer_vocab_size, fixed):
        raise ValueError(
            f"vocab_size={vocab_size} is padded from {tokenizer_vocab_size} by a rule that may depend on the tensor-parallel size; build the "
            f"model with {fixed} at every one: padded_vocab_size({tokenizer_vocab_size}, tree, {divisible_by}), which depends on the tree alone"
        )
