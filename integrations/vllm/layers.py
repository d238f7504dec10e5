"""vLLM's layers with tpinv's arithmetic: subclasses that vLLM instantiates in place of its own (``register_oot``, by class name).

    RowParallelLinear                            y = x W^T over K: tree, finished across ranks; the bias after the root
    QKV-, Merged-, ColumnParallelLinear          y = x W^T: one chain over K, which is whole; q, k, v (gate, up) are blocks of N
    ReplicatedLinear                             the same with one block
    VocabParallelEmbedding                       a selection, nothing is added
    LogitsProcessor (with ParallelLMHead)        a chain over K, then an exact gather
    RMSNorm, with residual                       hidden = x + residual, rounded; the norm of what was rounded
    SiluAndMul, RotaryEmbedding                  elementwise

Parameters, their names and loaders are vLLM's, so that checkpoints, load_weights and refits work as ever; the weights stay as they were
loaded, where stock vLLM repacks them on a CPU. M tokens, N out-features, K in-features, p ranks, L leaves; weights are [N/p, K].

A rank that holds a replicated KV head (fewer KV heads than ranks) computes the chains that another rank computes too: blocks are cut
into leaves by what share of the block a rank holds, not by p.
"""

import warnings

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.model_executor.custom_op import CustomOp, PluggableLayer
from vllm.model_executor.layers import activation, layernorm, linear, logits_processor, vocab_parallel_embedding
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding as StockRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.linear_scaling_rope import LinearScalingRotaryEmbedding as StockLinearScaling
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding as StockLlama3
from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding as StockYaRN

from tpinv import functional
from tpinv.collectives import Ranks, all_gather, resolve, select_all_reduce
from tpinv.integrations.vllm import defaults, options, rules
from tpinv.ops import products
from tpinv.ops.shapes import rows

ALONE = Ranks(None, 0, 1)


class TreeLinearMethod(linear.UnquantizedLinearMethod):
    """Holds a plain weight and leaves it as it was loaded. Products belong to the layers."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        raise RuntimeError(f"{type(layer).__name__} was asked for its product past its forward, which tpinv does not cover")


class TreeEmbeddingMethod(vocab_parallel_embedding.UnquantizedEmbeddingMethod):
    """As :class:`TreeLinearMethod`, for embedding and lm_head."""

    process_weights_after_loading = TreeLinearMethod.process_weights_after_loading
    apply = TreeLinearMethod.apply


class _Linear:
    """What the linears share. A mixin before vLLM's class."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if type(self.quant_method) is not linear.UnquantizedLinearMethod:
            raise ValueError(
                f"{self.prefix} has {type(self.quant_method).__name__}: quantised weights are not covered; load the unquantised checkpoint"
            )
        # After vLLM has chosen the weight loader, which it does by the name of the method's class.
        self.quant_method = TreeLinearMethod()
        self.tree = options.tree()
        self.ranks = _ranks(self.tp_size, self.prefix)

    def _bias(self) -> Tensor | None:
        return None if self.skip_bias_add else self.bias

    def _returned(self, y: Tensor):
        return (y, self.bias if self.skip_bias_add else None) if self.return_bias else y


class RowParallelLinear(_Linear, linear.RowParallelLinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.reduce_results and self.tp_size > 1:
            raise ValueError(f"{self.prefix} has reduce_results=False: a sum that is finished elsewhere is not covered")
        self.tree.leaf_length(self.input_size, f"{self.prefix}: in_features")

    def forward(self, x: Tensor):
        if not self.input_is_parallel:
            x = x.chunk(self.tp_size, -1)[self.tp_rank].contiguous()
        return self._returned(functional.row_parallel_linear(x, self.weight, self._bias(), tree=self.tree, group=self.ranks))


class _Columns(_Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.blocks = _shares([*zip(self._whole_blocks(), self.output_partition_sizes, strict=True)], self.tree, self.prefix)
        if self.tp_size > 1 and getattr(self, "gather_output", False) and len(self.blocks) > 1:
            raise ValueError(f"{self.prefix} gathers {len(self.blocks)} blocks, which would interleave them; not covered")

    def _whole_blocks(self) -> list[int]:
        return getattr(self, "output_sizes", None) or [self.output_size]

    def forward(self, x: Tensor):
        y = column_product(x, self.weight, self._bias(), self.blocks, self.tree)
        if getattr(self, "gather_output", False):
            y = all_gather(y, self.ranks, dim=-1).contiguous()
        return self._returned(y)


class ColumnParallelLinear(_Columns, linear.ColumnParallelLinear):
    pass


class MergedColumnParallelLinear(_Columns, linear.MergedColumnParallelLinear):
    pass


class QKVParallelLinear(_Columns, linear.QKVParallelLinear):
    def _whole_blocks(self) -> list[int]:
        """output_sizes counts a replicated head once a rank; the checkpoint has it once."""
        value_size = getattr(self, "v_head_size", self.head_size)
        return [size * heads for size, heads in zip((self.head_size, self.head_size, value_size), self._heads(), strict=True)]

    def _heads(self) -> tuple[int, int, int]:
        return self.total_num_heads, self.total_num_kv_heads, self.total_num_kv_heads


class ReplicatedLinear(_Columns, linear.ReplicatedLinear):
    pass


class VocabParallelEmbedding(vocab_parallel_embedding.VocabParallelEmbedding):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _check_vocabulary(self)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows past the vocabulary belong to padding of the batch: any row will do, and none is looked at."""
        first = self.ranks.rank * self.weight.shape[0]
        owned = (ids >= first) & (ids < first + self.weight.shape[0])
        picked = self.weight[(ids - first).masked_fill(~owned, 0).long()]
        return picked if self.ranks.size == 1 else select_all_reduce(picked, owned.unsqueeze(-1), self.ranks)


class ParallelLMHead(vocab_parallel_embedding.ParallelLMHead):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _check_vocabulary(self)


class LogitsProcessor(logits_processor.LogitsProcessor):
    """Logits in the model's dtype, or with head_dtype=float32 the fp32 chains themselves, not rounded."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        rules.check_current_config()
        if self.soft_cap is not None:
            raise ValueError(f"soft_cap={self.soft_cap}: capped logits are not covered")
        self.tree, self.ranks = options.tree(), resolve(get_tp_group().device_group)

    def _apply_head(self, lm_head, hidden_states: Tensor, embedding_bias: Tensor | None) -> Tensor:
        dtype = self.head_dtype or hidden_states.dtype
        if dtype not in (hidden_states.dtype, torch.float32):
            raise ValueError(f"head_dtype={dtype} of a {hidden_states.dtype} model is not covered; use float32 or leave it out")
        bias = None if embedding_bias is None else embedding_bias.to(dtype)
        shares = _shares([(lm_head.num_embeddings_padded, lm_head.weight.shape[0])], self.tree, "lm_head")
        return column_product(hidden_states, lm_head.weight, bias, shares, self.tree, dtype)

    def _gather_logits(self, logits: Tensor) -> Tensor:
        return all_gather(logits, self.ranks, dim=-1).contiguous()  # rows dense, as kernels of the sampler take them

    def get_top_tokens(self, *args, **kwargs):
        raise ValueError("the argmax over vocabulary shards belongs to speculative decoding, which is not covered; switch it off")

    get_top_k_tokens = get_top_tokens


class RMSNorm(layernorm.RMSNorm):
    """On a GPU, residual and norm are one launch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.variance_size_override is not None or not self.has_weight:
            raise ValueError(f"RMSNorm with var_hidden_size={self.variance_size_override}, has_weight={self.has_weight} is not covered")
        self.tree = options.tree()

    def forward(self, x: Tensor, residual: Tensor | None = None):
        if residual is None:
            return functional.rms_norm(x, self.weight, self.variance_epsilon, tree=self.tree)
        arguments = rows(x), rows(residual), self.weight.detach(), self.variance_epsilon
        y, hidden = products.rows_backend("add_norm", x).add_norm(*arguments)
        return y.view(x.shape), hidden.view(x.shape)


class SiluAndMul(activation.SiluAndMul):
    def forward(self, x: Tensor) -> Tensor:
        return functional.swiglu(x)


class _Rotary:
    """cos and sin in the model's dtype, every product and sum rounded to it: what transformers and Megatron-Core compute. On a GPU a
    kernel does the same in one launch, vLLM's or ours, where a probe finds the same bytes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.computed_by = "torch"
        if self.cos_sin_cache.is_cuda:
            with defaults.torchs_own():
                self.computed_by = next((name for name in self._KERNELS if self._agrees(name)), "torch")

    def _compute_inv_freq(self, *arguments) -> Tensor:
        """A CPU's powers of the base, as trainers have them: a GPU's differ in the last bit."""
        device = torch.get_default_device()
        with defaults.torchs_own():
            return super()._compute_inv_freq(*arguments).to(device)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor | None = None):
        return getattr(self, self._KERNELS.get(self.computed_by, "forward_native"))(positions, query, key)

    _KERNELS = {"vLLM's kernel": "forward_cuda", "tpinv's kernel": "_forward_ours"}

    def _forward_ours(self, positions: Tensor, query: Tensor, key: Tensor | None):
        table = self._match_cos_sin_cache_dtype(query)
        flat = [None if t is None else t.view(-1, t.shape[-1]) for t in (query, key)]
        products.rows_backend("rope", query).rotate(*flat, positions.flatten(), table, self.head_size, interleaved=not self.is_neox_style)
        return query, key

    def _agrees(self, name: str) -> bool:
        cache, width = self.cos_sin_cache, self.head_size
        generator = torch.Generator(cache.device).manual_seed(0)
        positions = torch.arange(0, len(cache), max(1, len(cache) // 61), device=cache.device)
        make = lambda heads: torch.randn(len(positions), heads * width, device=cache.device, generator=generator).to(cache.dtype)  # noqa: E731
        query, key = make(6), make(3)  # the kernel asks for whole groups
        expected = self.forward_native(positions, query.clone(), key.clone())
        try:
            found = getattr(self, self._KERNELS[name])(positions, query.clone(), key.clone())
        except Exception as error:  # a question of speed alone
            warnings.warn(f"rotary embedding by {name} fails ({type(error).__name__}: {error}); torch's operators compute it", stacklevel=2)
            return False
        return all(torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in zip(found, expected, strict=True))


class RotaryEmbedding(_Rotary, StockRotaryEmbedding):
    pass


class Llama3RotaryEmbedding(_Rotary, StockLlama3):
    pass


class LinearScalingRotaryEmbedding(_Rotary, StockLinearScaling):
    pass


class YaRNScalingRotaryEmbedding(_Rotary, StockYaRN):
    pass


def rope_names(model: torch.nn.Module) -> list[str]:
    """Who computes the model's rotary embeddings."""
    return sorted({module.computed_by for module in model.modules() if isinstance(module, _Rotary)})


def column_product(x: Tensor, weight: Tensor, bias: Tensor | None, blocks, tree, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., K], weight [N/p, K], bias [N/p] -> [..., N/p] in ``dtype``: every element a chain over K. ``blocks``: of N/p, see _shares.

    A GPU kernel's element depends on its row and column alone, so that all blocks are one product. On a CPU what a BLAS is given must
    have one width at every p: a leaf of a block.
    """
    matrix, dtype = rows(x), dtype or x.dtype
    if products.on_gpu(x):
        y = products.local_product(matrix, weight.t(), tree, ALONE, dim=1, dtype=dtype, bias=bias)
    else:
        parts, first = [], 0
        for width, shares in blocks:
            block = slice(first, first + width)
            block_bias = None if bias is None else bias[block]
            share = Ranks(None, 0, shares)
            parts.append(products.local_product(matrix, weight[block].t(), tree, share, dim=1, dtype=dtype, bias=block_bias))
            first += width
        y = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    return y.view(*x.shape[:-1], weight.shape[0])


def _shares(blocks: list[tuple[int, int]], tree, name: str) -> list[tuple[int, int]]:
    """(whole, local) widths -> (local width, how many such shares make the whole). ValueError where a block has no equal leaves."""
    for whole, local in blocks:
        tree.leaf_length(whole, f"{name}: out_features")
        tree.owned(0, whole // local)
    return [(local, whole // local) for whole, local in blocks]


def _ranks(tp_size: int, name: str) -> Ranks:
    ranks = resolve(get_tp_group().device_group)
    if tp_size not in (1, ranks.size):
        raise ValueError(f"{name} is sharded over {tp_size} of {ranks.size} tensor-parallel ranks, which is not covered")
    return ranks if tp_size > 1 else ALONE


def _check_vocabulary(layer) -> None:
    rules.check_current_config()
    if type(layer.quant_method) is not vocab_parallel_embedding.UnquantizedEmbeddingMethod:
        raise ValueError(f"the vocabulary has {type(layer.quant_method).__name__}: quantised weights are not covered; load others")
    if layer.num_added_embeddings:
        raise ValueError(f"{layer.num_added_embeddings} added embeddings (LoRA) are not covered")
    if not getattr(layer, "reduce_results", True) or getattr(layer, "parallel_group", None) is not None:
        raise ValueError("an embedding over another group, or whose sum is finished elsewhere, is not covered")
    layer.quant_method = TreeEmbeddingMethod()
    layer.ranks = _ranks(layer.tp_size, "the vocabulary")
    options.tree().leaf_length(layer.num_embeddings_padded, "the padded vocabulary")


_PLUGGABLE = (
    RowParallelLinear, ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, VocabParallelEmbedding,
    ParallelLMHead, LogitsProcessor,
)  # fmt: skip
_CUSTOM = (
    RMSNorm, SiluAndMul, RotaryEmbedding, Llama3RotaryEmbedding, LinearScalingRotaryEmbedding, YaRNScalingRotaryEmbedding,
)  # fmt: skip
REPLACED = {replacement.__name__: replacement for replacement in (*_PLUGGABLE, *_CUSTOM)}


def register() -> None:
    for base, classes in ((PluggableLayer, _PLUGGABLE), (CustomOp, _CUSTOM)):
        for replacement in classes:
            base.register_oot(replacement, name=replacement.__name__)
