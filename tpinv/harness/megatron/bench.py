"""A training step of Megatron-Core on GPUs, with stock modules and with tpinv's. Model, DistributedDataParallel, optimizer and data are the
same in both.

Stock of the local spec: cuBLAS linears, NCCL, torch's fused RMSNorm, compiled SwiGLU, bias-dropout-add and cross-entropy, and FlashAttention
through SDPA in the place of the unfused local attention. Stock of TransformerEngine's ("te"): its linears with weight gradients accumulated
into main_grad by their products (the output layer's too, where Apex is missing by wgrad.py), its norms, attention, rope, cross-entropy and Adam.
tpinv's is the same model, converted.
"""

import gc
import logging
import statistics
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention, silu

from tpinv.harness.megatron.verify import StockProvider, te_spec
from tpinv.integrations.megatron import convert, convert_optimizer, gpt_layer_spec
from tpinv.integrations.megatron.specs import block_spec
from tpinv.tree import ReductionTree


@dataclass(frozen=True)
class Step:
    """What is timed. The widths are Llama-3-8B's."""

    layers: str  # "stock" or "tpinv"
    tp: int
    sequence_parallel: bool = False
    spec: str = "local"  # or "te"
    leaves: int = 8
    node_dtype: str = "float32"
    num_layers: int = 4
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    groups: int = 8
    vocabulary: int = 128256
    sequence: int = 4096
    steps: int = 10
    warmup: int = 3
    profile: bool = False


class FlashDotProductAttention(DotProductAttention):
    """FlashAttention through SDPA, causal."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class FlashProvider(StockProvider):
    def core_attention(self) -> type:
        return FlashDotProductAttention


def _config(step: Step) -> TransformerConfig:
    te = step.spec == "te"
    return TransformerConfig(
        num_layers=step.num_layers, hidden_size=step.hidden, ffn_hidden_size=step.ffn, num_attention_heads=step.heads,
        num_query_groups=step.groups, kv_channels=step.hidden // step.heads, normalization="RMSNorm", activation_func=silu,
        gated_linear_unit=True, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, masked_softmax_fusion=False,
        bias_activation_fusion=True, bias_dropout_fusion=True, cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te" if te else "native", apply_rope_fusion=te, gradient_accumulation_fusion=te, tensor_model_parallel_size=step.tp, sequence_parallel=step.sequence_parallel,
        params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, bf16=True,
    )  # fmt: skip


def _model(step: Step, config: TransformerConfig) -> GPTModel:
    tree = ReductionTree(step.leaves, step.node_dtype)
    ours = step.layers == "tpinv"
    if step.spec == "te":
        spec = te_spec(config)
    else:
        spec = gpt_layer_spec(config, tree=tree) if ours else block_spec(config, FlashProvider())
    model = GPTModel(
        config,
        transformer_layer_spec=spec,
        vocab_size=step.vocabulary,
        max_sequence_length=step.sequence,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).cuda()
    return convert(model, tree=tree) if ours else model


def measure(step: Step) -> dict:
    """On every rank. Medians in milliseconds, of the slowest rank; the peak in bytes, of the largest. ``profile`` lists GPU kernels by time."""
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("tpinv").setLevel(logging.ERROR)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=step.tp)
    try:
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        torch.manual_seed(1234)
        return _measure(step)
    finally:
        parallel_state.destroy_model_parallel()
        gc.collect()
        torch.cuda.empty_cache()


def _measure(step: Step) -> dict:
    config = _config(step)
    gpt = _model(step, config)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), Float16Module(config, gpt))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-4, weight_decay=0.1, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16), [model]
    )
    if step.layers == "tpinv":
        convert_optimizer(optimizer)
    generator = torch.Generator("cuda").manual_seed(1)
    text = torch.randint(step.vocabulary, (1, step.sequence + 1), device="cuda", generator=generator)
    tokens, labels, positions = text[:, :-1], text[:, 1:], torch.arange(step.sequence, device="cuda").unsqueeze(0)
    marks, losses = [], []

    def one() -> None:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        events[0].record()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(tokens, positions, None, labels=labels).mean()
        events[1].record()
        loss.backward()
        finalize_model_grads([model])
        events[2].record()
        optimizer.step()
        events[3].record()
        marks.append(events)
        losses.append(loss.detach())

    for _ in range(step.warmup):
        one()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks.clear()
    for _ in range(step.steps):
        one()
    torch.cuda.synchronize()
    spans = {"forward": (0, 1), "backward": (1, 2), "optimizer": (2, 3), "step": (0, 3)}
    result = {name: statistics.median(m[a].elapsed_time(m[b]) for m in marks) for name, (a, b) in spans.items()}
    result["peak"] = float(torch.cuda.max_memory_allocated())
    slowest = torch.tensor(list(result.values()), device="cuda", dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    result = dict(zip(result, slowest.tolist(), strict=True)) | {"loss": losses[-1].item()}
    if step.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            one()
            torch.cuda.synchronize()
        kernels = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
        result["kernels"] = [(row.key[:110], row.count, round(row.self_device_time_total / 1e3, 3)) for row in kernels[:60]]
    return result
