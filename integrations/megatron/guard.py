"""What cannot be invariant, or is not shown to be, is refused before a model trains on it: rule, value, fix."""

import math

from tpinv.tree import ReductionTree


def _rules(config, tp: int):
    """(holds, rule and value, fix) for every setting that convert and the specs check. Unknown settings of other versions are None."""

    def get(name, default=None):
        return getattr(config, name, default)

    groups = get("num_query_groups") or get("num_attention_heads")
    gelu_fused = bool(get("bias_activation_fusion")) and bool(get("add_bias_linear")) and not get("gated_linear_unit")
    off = [  # (setting, why it changes bits with TP)
        ("hidden_dropout", "dropout draws from a stream per rank"),
        ("attention_dropout", "dropout draws from a stream per rank"),
        ("fp8", "fp8 scales are taken from a rank's shard"),
        ("fp4", "fp4 scales are taken from a rank's shard"),
        ("tp_comm_overlap", "userbuffers add chunks in an order of their own"),
        ("gradient_accumulation_fusion", "the fused wgrad kernel adds in an order that depends on the shard"),
        ("defer_embedding_wgrad_compute", "deferred wgrads are accumulated in another order"),
        ("cpu_offloading", "activation offloading hooks the stock layers' autograd functions"),
        ("multi_latent_attention", "multi-latent attention is not covered"),
        ("num_moe_experts", "mixture of experts is not covered"),
        ("mtp_num_layers", "multi-token prediction is not covered"),
        ("layernorm_zero_centered_gamma", "the zero-centred gamma is not covered"),
        ("symmetric_ar_type", "symmetric-memory all-reduces add in rank order"),
        ("use_kitchen", "kitchen layers are not covered"),
        ("use_te_activation_func", "TransformerEngine's activations are not covered"),
        ("batch_invariant_mode", "batch_invariant_mode replaces aten::mm underneath tpinv's own products"),
    ]
    for name, why in off:
        yield not get(name), f"{name}={get(name)!r}: {why}", f"set {name}={_off_value(get(name))}"
    yield (get("context_parallel_size", 1) or 1) == 1, f"context_parallel_size={get('context_parallel_size')}: not covered", "use 1"
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


def check_vocabulary(vocab_size: int, tree: ReductionTree, tokenizer_vocab_size: int | None) -> None:
    """ValueError unless the model's vocabulary has equal leaves and, when the tokenizer's size is given, does not depend on TP."""
    if vocab_size % tree.leaves:
        raise ValueError(
            f"vocab_size={vocab_size} is no multiple of leaves={tree.leaves}, so it would have to be padded, and differently at every "
            f"tensor-parallel size; build the model with {padded_vocab_size(vocab_size, tree)} (padded_vocab_size) at every one"
        )
    if tokenizer_vocab_size is None:
        return
    fixed = padded_vocab_size(tokenizer_vocab_size, tree)
    if vocab_size not in (tokenizer_vocab_size, fixed):
        raise ValueError(
            f"vocab_size={vocab_size} is padded from {tokenizer_vocab_size} by a rule that may depend on the tensor-parallel size; "
            f"build the model with {fixed} (padded_vocab_size) at every one, which depends on the tree alone"
        )
