"""Attention by leaves over vLLM's paged cache: tpinv.functional.paged_attention and append_kv behind vLLM's backend interface.

A prompt in one prefill, in chunks, from cached prefixes or recomputed after a preemption, and a decode beside any other requests: one set
of bytes. vLLM's cache is [blocks, kv heads, block size, 2 d], keys and values side by side in the last dimension; its views are what the
kernels read, so that a request's keys have the same bytes at every tensor-parallel size, on the rank that owns the head.

The classes go under names that vLLM chooses by itself: CPU_ATTN on a CPU, FLASH_ATTN on a GPU, and CUSTOM for who asks. Metadata are the
batch's own tensors: nothing is planned on the host, lengths are read on the device, so that a decode can be part of a CUDA graph.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from tpinv import functional
from tpinv.integrations.vllm import defaults
from tpinv.ops.paged_attention import SMALLEST_PAGE, require_paged


@dataclass
class TreeMetadata(AttentionMetadata):
    """What paged_attention takes. max_*: upper bounds, of which no bit depends."""

    num_actual_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    max_query_len: int
    max_seq_len: int


class TreeMetadataBuilder(AttentionMetadataBuilder[TreeMetadata]):
    # Of a decode alone: a graph's grid is bounded by the longest query it was recorded with, which is one token then. Speculation makes
    # longer queries, so that its graphs break at attention.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.longest = vllm_config.model_config.max_model_len
        if torch.device(device).type == "cuda":
            heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
            try:
                with defaults.torchs_own():
                    warm_up(kv_cache_spec, heads, self.longest, torch.device(device))
            except Exception as error:  # a question of the first request's time alone: check_layers has compared the bytes
                warnings.warn(f"attention could not be warmed up ({type(error).__name__}: {error})", stacklevel=2)

    def build(self, common_prefix_len: int, common_attn_metadata, fast_build: bool = False) -> TreeMetadata:
        """``common_prefix_len`` is for cascade attention, which use_cascade_attention leaves off."""
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(f"causal={common.causal}: only causal attention is covered")
        return TreeMetadata(
            common.num_actual_tokens,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping,
            common.max_query_len,
            common.max_seq_len,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata) -> TreeMetadata:
        """Replays will meet longer requests than the capture's."""
        metadata = self.build(0, common_attn_metadata)
        metadata.max_seq_len = self.longest
        return metadata


def warm_up(spec, heads: int, longest: int, device: torch.device) -> None:
    """Compiles what the first prefill and the first decode would wait for: vLLM's own warm-up has no attention in it. ``spec``: of the
    cache, ``heads``: query heads of this rank."""
    width, queries, pages = spec.head_size, min(80, longest), -(-longest // spec.block_size)
    empty = lambda *shape, dtype=torch.int32: torch.zeros(*shape, dtype=dtype, device=device)  # noqa: E731
    qkv = empty(queries, (heads + 2 * spec.num_kv_heads) * width, dtype=spec.dtype)
    query, key, value = (
        t.view(queries, -1, width) for t in qkv.split([n * width for n in (heads, spec.num_kv_heads, spec.num_kv_heads)], -1)
    )
    used = -(-queries // spec.block_size)
    views = empty(used, spec.num_kv_heads, spec.block_size, 2 * width, dtype=spec.dtype).transpose(1, 2).split(width, -1)
    table = empty(1, pages)
    table[0, :used] = torch.arange(used, dtype=torch.int32, device=device)
    with torch.inference_mode():
        functional.append_kv(key, value, *views, torch.arange(queries, device=device))
        for count in (queries, 1):  # a prefill's kernels, and a decode's
            lengths, starts = empty(1) + queries, torch.tensor([0, count], dtype=torch.int32, device=device)
            functional.paged_attention(
                query[:count], *views, block_table=table, seq_lens=lengths, query_start_loc=starts, max_query_len=count, max_seq_len=longest
            )


class TreeAttention(AttentionImpl[TreeMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others,
    ):
        refused = {
            "alibi_slopes": alibi_slopes is not None,
            f"kv_sharing_target_layer_name={kv_sharing_target_layer_name}": kv_sharing_target_layer_name is not None,
            f"attn_type={attn_type}": attn_type != AttentionType.DECODER,
            f"{others}": any(value is not None for value in others.values()),
        }
        if given := [name for name, holds in refused.items() if holds]:
            raise ValueError(f"attention with {', '.join(given)} is not covered; use a decoder with causal attention")
        # vLLM's window counts a query's own key, as ours does, and its cap of 0 is none. Which models may have them: rules.py.
        given = {"sliding_window": sliding_window, "softcap": logits_soft_cap or None, "sinks": sinks}
        self.options = {name: option for name, option in given.items() if option is not None}
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None, **others
    ) -> Tensor:
        """query, output: [tokens, heads, d]. Keys and values are in the cache already. Without metadata it is a warm-up: zeros."""
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("quantised output is not covered; load the unquantised checkpoint")
        if attn_metadata is None:
            return output.zero_()
        keys, values = self._views(kv_cache)
        return functional.paged_attention(
            query.view(-1, self.num_heads, self.head_size),
            keys,
            values,
            block_table=attn_metadata.block_table,
            seq_lens=attn_metadata.seq_lens,
            query_start_loc=attn_metadata.query_start_loc,
            max_query_len=attn_metadata.max_query_len,
            max_seq_len=attn_metadata.max_seq_len,
            scale=self.scale,
            out=output.view(-1, self.num_heads, self.head_size),
            **self.options,
        )

    def do_kv_cache_update(self, layer, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        functional.append_kv(key, value, *self._views(kv_cache), slot_mapping[: len(key)])

    def _views(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """[blocks, kv heads, block size, 2 d] -> keys and values, [blocks, block size, kv heads, d] each."""
        return kv_cache.transpose(1, 2).split(self.head_size, -1)


class TreeAttentionBackend(AttentionBackend):
    supported_dtypes = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes = ["auto", "bfloat16", "float16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls():
        return TreeAttention

    @staticmethod
    def get_builder_cls():
        return TreeMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(SMALLEST_PAGE)]

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"):
        """vLLM 0.26, which lays out the dimensions in memory as they stand here."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @classmethod
    def supported_kv_cache_layouts(cls):
        """vLLM 0.32."""
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return capability.major >= 8

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [*range(16, 257, 16)]


class FlashAttentionName(TreeAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "FLASH_ATTN"


class CPUAttentionName(TreeAttentionBackend):
    supported_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes = ["auto", "bfloat16", "float16", "float32"]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(32)]


def register() -> None:
    names = {"CUSTOM": TreeAttentionBackend, "FLASH_ATTN": FlashAttentionName, "CPU_ATTN": CPUAttentionName}
    for name, backend in names.items():
        register_backend(AttentionBackendEnum[name], f"{__name__}.{backend.__name__}")


def is_layer(module: torch.nn.Module) -> bool:
    return type(module) is Attention


def check_layers(model: torch.nn.Module) -> None:
    """ValueError unless attention is ours in all layers, and invariant on this very device (a probe, before any graph is captured)."""
    for name, module in model.named_modules():
        if is_layer(module) and not isinstance(module.impl, TreeAttention):
            raise ValueError(
                f"{name} has the attention backend {module.attn_backend.get_name()} of {type(module.impl).__module__}; set "
                'attention_config={"backend": "CUSTOM"}, or leave the choice to vLLM'
            )
    device = next(model.parameters()).device
    with defaults.torchs_own():
        for width, *options in {(module.head_size, *module.impl.options) for module in model.modules() if is_layer(module)}:
            kinds = tuple(name in options for name in ("sliding_window", "softcap", "sinks"))
            require_paged(device, next(model.parameters()).dtype, width, *([kinds] if options else []))


def backend_name(model: torch.nn.Module) -> str:
    return next(module.attn_backend.__name__ for module in model.modules() if is_layer(module))
