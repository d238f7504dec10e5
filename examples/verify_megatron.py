"""Your Megatron-Core model for ``tpinv verify``: a factory that builds it as your training script does, for the size it is told.

    tpinv verify --model examples/verify_megatron.py:build --tp 1,2,4 --dtype bf16

verify has set up Megatron's parallel state; it converts the model in tpinv's runs and leaves it alone in stock's, wraps it in Float16Module
and DistributedDataParallel, and trains it on real text with Megatron's Adam. Return (model, batches) to train on your own data.
"""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from tpinv.integrations.megatron import padded_vocab_size


def build(tree, tp, dtype):
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=152,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        masked_softmax_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # No use_cpu_initialization: every shard is drawn by itself, and verify loads the weights of TP = 1.
    )
    model = GPTModel(
        config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=padded_vocab_size(256, tree),
        max_sequence_length=48,
        position_embedding_type="rope",
    )
    return {"model": model, "convert": {"tokenizer_vocab_size": 256}}
