"""Megatron-Core: a GPTModel of the local spec with the checkpoint's sizes."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tpinv.collectives import Ranks, all_gather, resolve
from tpinv.functional import vocab_parallel_log_probs
from tpinv.harness.across import DTYPES, Task
from tpinv.harness.megatron.verify import StockProvider
from tpinv.integrations.megatron import convert, gpt_layer_spec, on_cpu
from tpinv.integrations.megatron.huggingface import load_hf_weights
from tpinv.integrations.megatron.specs import block_spec
from tpinv.tree import ReductionTree


def _leave(weight: Tensor) -> Tensor:
    return weight


def build_config(config: PreTrainedConfig, tp: int, sequence_parallel: bool, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's settings for a Llama or Qwen 3 of transformers."""
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=bool(config.attention_bias),
        qk_layernorm=config.model_type == "qwen3",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        init_method=_leave,  # the checkpoint's weights come
        output_layer_init_method=_leave,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )


@contextlib.contextmanager
def opened(task: Task, variant: str) -> Iterator[tuple[Callable[[Tensor], Tensor], Ranks]]:
    """The checkpoint, loaded: a function from tokens [b, s] to this rank's logits [b, s, V/p], and the ranks that share them."""
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    tp, tree, ours = dist.get_world_size(), ReductionTree(task.leaves, task.node_dtype), task.layers == "tpinv"
    checkpoint = AutoConfig.from_pretrained(task.path)
    weights = AutoModelForCausalLM.from_pretrained(task.path, dtype=DTYPES[task.dtype]).state_dict()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    try:
        with on_cpu(), torch.no_grad():
            if task.device == "cuda":
                tensor_parallel.model_parallel_cuda_manual_seed(0)  # Megatron forks that stream around dropout, 0 too
            config = build_config(checkpoint, tp, variant == "SP", DTYPES[task.dtype])
            model = GPTModel(
                config,
                transformer_layer_spec=gpt_layer_spec(config, tree=tree) if ours else block_spec(config, StockProvider()),
                vocab_size=checkpoint.vocab_size,
                max_sequence_length=task.length,
                position_embedding_type="rope",
                rotary_base=checkpoint.rope_parameters["rope_theta"],
                share_embeddings_and_output_weights=checkpoint.tie_word_embeddings,
            ).to(task.device, DTYPES[task.dtype])
            if ours:
                convert(model, tree=tree, tokenizer_vocab_size=checkpoint.vocab_size, make_vocab_size_divisible_by=1)
            load_hf_weights(model.eval(), weights)

            def local_logits(tokens: Tensor) -> Tensor:
                batch, length = tokens.shape
                causal = torch.ones(1, 1, length, length, device=tokens.device).triu(1).bool()
                return model(tokens, torch.arange(length, device=tokens.device).expand(batch, -1), causal)

            yield local_logits, resolve(model.pg_collection.tp)
    finally:
        parallel_state.destroy_model_parallel()


def compute(task: Task, variant: str) -> dict[str, Tensor] | None:
    tokens = task.tokens
    with opened(task, variant) as (local_logits, ranks):
        logits = local_logits(tokens)
        whole = all_gather(logits.contiguous(), ranks, dim=-1)
        if task.layers == "tpinv":
            log_probs = vocab_parallel_log_probs(logits[:, :-1], tokens[:, 1:], tree=ReductionTree(task.leaves), group=ranks)
        else:
            log_probs = whole[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return {"logits": whole, "log_probs": log_probs} if dist.get_rank() == 0 else None
