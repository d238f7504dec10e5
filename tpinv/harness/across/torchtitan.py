"""TorchTitan: a decoder config with the checkpoint's sizes, parallelized by its own code under the override, without a Trainer."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

from tpinv.harness.torchtitan.verify import shard_dim  # isort: skip  # before torchtitan
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.config import ParallelismConfig
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.common import Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tpinv.collectives import Ranks, resolve
from tpinv.functional import vocab_parallel_log_probs
from tpinv.harness.across import DTYPES, Task
from tpinv.harness.torchtitan.recipe import OVERRIDE
from tpinv.integrations.torchtitan.rope import ModelDtypeRoPE
from tpinv.layers import shard
from tpinv.tree import ReductionTree

NAMES = {  # Hugging Face's: TorchTitan's
    "model.embed_tokens": "tok_embeddings",
    "model.layers": "layers",
    "model.norm": "norm",
    "self_attn.q_proj": "attention.qkv_linear.wq",
    "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def in_titan(name: str) -> str:
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def build_config(config: PreTrainedConfig, length: int):
    """TorchTitan's settings for a Llama or Qwen 3 of transformers, rope on halves."""
    qwen = config.model_type == "qwen3"
    nothing = {"weight": nn.init.zeros_}  # overwritten by the checkpoint
    norm = partial(RMSNorm.Config, eps=config.rms_norm_eps, param_init={"weight": nn.init.ones_})

    def layer():
        return (Qwen3TransformerBlock if qwen else Llama3TransformerBlock).Config(
            attention_norm=norm(normalized_shape=config.hidden_size),
            ffn_norm=norm(normalized_shape=config.hidden_size),
            attention=make_gqa_config(
                dim=config.hidden_size,
                n_heads=config.num_attention_heads,
                n_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                wqkv_param_init=nothing,
                wo_param_init=nothing,
                inner_attention=ScaledDotProductAttention.Config(),
                rope=ModelDtypeRoPE.Config(dim=config.head_dim, max_seq_len=length, theta=config.rope_parameters["rope_theta"]),
                fuse_qkv=False,
                qk_norm=norm(normalized_shape=config.head_dim) if qwen else None,
            ),
            feed_forward=make_ffn_config(
                dim=config.hidden_size, hidden_dim=config.intermediate_size, w1_param_init=nothing, w2w3_param_init=nothing
            ),
        )

    return (Qwen3Model if qwen else Llama3Model).Config(
        dim=config.hidden_size,
        vocab_size=config.vocab_size,
        enable_weight_tying=False,
        tok_embeddings=Embedding.Config(num_embeddings=config.vocab_size, embedding_dim=config.hidden_size, param_init=nothing),
        norm=norm(normalized_shape=config.hidden_size),
        lm_head=Linear.Config(in_features=config.hidden_size, out_features=config.vocab_size, param_init=nothing),
        layers=[layer() for _ in range(config.num_hidden_layers)],
    )


@contextlib.contextmanager
def opened(task: Task, variant: str) -> Iterator[tuple[Callable[[Tensor], Tensor], Ranks]]:
    """The checkpoint, loaded: a function from tokens [b, s] to this rank's logits [b, s, V/p], and the ranks that share them."""
    tp, rank = dist.get_world_size(), dist.get_rank()
    checkpoint = AutoConfig.from_pretrained(task.path)
    hf = AutoModelForCausalLM.from_pretrained(task.path, dtype=DTYPES[task.dtype])
    weights = {in_titan(name): value for name, value in hf.state_dict().items()}
    config = build_config(checkpoint, task.length)
    parallelism = ParallelismConfig(tensor_parallel_degree=tp, enable_sequence_parallel=variant == "SP")
    dist_utils.set_spmd_backend("spmd_types")
    config.update_from_config(config=dataclasses.make_dataclass("Settings", [("parallelism", ParallelismConfig)])(parallelism))
    if task.layers == "tpinv":
        apply_overrides(OverrideConfig(imports=[(OVERRIDE, {"leaves": task.leaves})]), config)
    with torch.device(task.device):  # which computes rope's cache
        model = config.build()
    dims = ParallelDims.from_config(parallelism, tp)
    model.parallelize(dims)
    with torch.no_grad(), dist_utils.get_spmd_context(parallel_dims=dims)():
        model.init_weights(buffer_device=None)
        model.to(task.device, DTYPES[task.dtype])
        for name, parameter in model.named_parameters():
            if name not in weights:
                raise ValueError(f"{name} has no counterpart in the checkpoint, which has {sorted(weights)[:5]} ...")
            dim = shard_dim(model, name)
            parameter.copy_(weights[name] if dim is None else shard(weights[name], dim, rank, tp))

        def local_logits(tokens: Tensor) -> Tensor:
            logits = model(tokens)
            return logits if tp == 1 or logits.shape[-1] < checkpoint.vocab_size else logits.chunk(tp, -1)[rank].contiguous()

        yield local_logits, resolve() if tp > 1 else Ranks(None, 0, 1)


def compute(task: Task, variant: str) -> dict[str, Tensor] | None:
    tokens = task.tokens
    with opened(task, variant) as (local_logits, group):
        local = local_logits(tokens)
        whole = torch.cat(_gather(local), -1) if group.size > 1 else local
        if task.layers == "tpinv":
            log_probs = vocab_parallel_log_probs(local[:, :-1], tokens[:, 1:], tree=ReductionTree(task.leaves), group=group)
        else:
            log_probs = whole[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return {"logits": whole, "log_probs": log_probs} if dist.get_rank() == 0 else None


def _gather(tensor: Tensor) -> list[Tensor]:
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts
