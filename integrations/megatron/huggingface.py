"""Weights between Hugging Face's names (Llama, Qwen 3) and a Megatron-Core GPTModel of any tensor-parallel size.

For RL and for comparisons: the trainer's weights go to an engine that loads Hugging Face checkpoints, and a checkpoint comes in. No bit
changes on the way; what a model has and the checkpoint has not, or the other way round, is an error.

Megatron joins what Hugging Face keeps apart: q, k and v of one query group lie side by side in linear_qkv, gate and up in linear_fc1,
whose rank r holds [gate_r; up_r]. Legend: V vocabulary, H hidden, d head width, g query groups.
"""

from collections.abc import Iterator, Mapping

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tpinv.collectives import Ranks, all_gather, resolve
from tpinv.layers import shard, unshard

# Megatron's name in a layer: Hugging Face's, the sharded dimension, its stride. qkv and fc1 are put together below.
IN_A_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight", None, 1),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", None, 1),
    "self_attention.linear_qkv.weight": ("self_attn.{q,k,v}_proj.weight", 0, 1),
    "self_attention.linear_qkv.bias": ("self_attn.{q,k,v}_proj.bias", 0, 1),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", 1, 1),
    "self_attention.linear_proj.bias": ("self_attn.o_proj.bias", None, 1),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", None, 1),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", None, 1),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", None, 1),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight", None, 1),
    "mlp.linear_fc1.weight": ("mlp.{gate,up}_proj.weight", 0, 2),
    "mlp.linear_fc1.bias": ("mlp.{gate,up}_proj.bias", 0, 2),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight", 1, 1),
    "mlp.linear_fc2.bias": ("mlp.down_proj.bias", None, 1),
}
OUTSIDE = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight", 0, 1),
    "decoder.final_layernorm.weight": ("model.norm.weight", None, 1),
    "output_layer.weight": ("lm_head.weight", 0, 1),
}


def load_hf_weights(model: GPTModel, weights: Mapping[str, Tensor]) -> None:
    """Copies ``weights``, whole tensors under Hugging Face's names, into this rank's shards of ``model`` (bare, not wrapped).

    A vocabulary that Megatron padded is filled up with zeros. Tied models take lm_head.weight from the embedding.

    Raises:
        ValueError: names that one side has and the other has not, or shapes that do not fit.
    """
    ranks, used = _ranks(model), set()
    restore_frequencies(model)
    with torch.no_grad():
        for name, parameter, (source, dim, stride) in _parameters(model):
            names = _expand(source)
            missing = [n for n in names if n not in weights]
            if missing:
                raise ValueError(f"{name} needs {missing}, which the checkpoint does not have; is it of another architecture?")
            used.update(names)
            whole = _join(name, [weights[n] for n in names], model.config)
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                whole = torch.nn.functional.pad(whole, (0, 0, 0, model.vocab_size - whole.shape[0]))
            part = whole if dim is None else shard(whole, dim, ranks.rank, ranks.size, stride)
            if part.shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(parameter.shape)}, the checkpoint's {names} make {tuple(part.shape)} of it")
            parameter.copy_(part)
    tied = {"lm_head.weight"} if model.share_embeddings_and_output_weights else set()
    unused = {name for name in weights if name not in used | tied and not name.endswith("rotary_emb.inv_freq")}
    if unused:
        raise ValueError(f"the model has no place for {sorted(unused)[:5]} ({len(unused)} in all); is it built from the same config?")


def restore_frequencies(model: GPTModel) -> None:
    """Gives rope the frequencies that transformers has: a CPU's powers of the base. A model that was built on a GPU has that GPU's, which
    differ in the last bit; engines and trainers would then disagree. Does nothing to a model without rope, or with scaled frequencies,
    which must be built with ``use_cpu_initialization=True``."""
    rotary = getattr(model, "rotary_pos_emb", None)
    if not isinstance(rotary, RotaryEmbedding) or model.rotary_scaling:
        return
    width = 2 * len(rotary.inv_freq)
    frequencies = 1.0 / (model.rotary_base ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width))
    if torch.allclose(rotary.inv_freq.cpu(), frequencies, rtol=1e-5, atol=0):
        rotary.inv_freq = frequencies.to(rotary.inv_freq.device)


def iterate_hf_weights(model: GPTModel, vocab_size: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under Hugging Face's names, one parameter at a time, on every rank: what ``load_weights`` of an engine takes.

    Every rank must iterate to the end. ``vocab_size``: leave out rows that padded the vocabulary.
    """
    ranks = _ranks(model)
    for name, parameter, (source, dim, stride) in _parameters(model):
        whole = parameter.detach()
        if dim is not None and ranks.size > 1:
            whole = unshard(list(all_gather(whole.contiguous().unsqueeze(0), ranks).unbind(0)), dim, stride)
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            whole = whole[:vocab_size]
        yield from zip(_expand(source), _split(name, whole, model.config), strict=True)


def _ranks(model: GPTModel) -> Ranks:
    return resolve(model.pg_collection.tp)


def _parameters(model: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter, tuple]]:
    for name, parameter in model.named_parameters():
        if name in OUTSIDE:
            yield name, parameter, OUTSIDE[name]
            continue
        parts = name.split(".", 3)
        known = IN_A_LAYER.get(parts[3]) if parts[:2] == ["decoder", "layers"] else None
        if known is None:
            raise ValueError(f"{name} has no counterpart in a Llama or Qwen 3 checkpoint; covered are dense decoders with rope")
        number = int(parts[2]) + model.decoder.layers[0].layer_number - 1
        yield name, parameter, (f"model.layers.{number}.{known[0]}", *known[1:])


def _expand(source: str) -> list[str]:
    """ "a.{q,k}_proj" -> ["a.q_proj", "a.k_proj"]."""
    if "{" not in source:
        return [source]
    before, _, rest = source.partition("{")
    inside, _, after = rest.partition("}")
    return [before + name + after for name in inside.split(",")]


def _join(name: str, parts: list[Tensor], config) -> Tensor:
    if "linear_qkv" in name and len(parts) == 3:
        groups = [part.unflatten(0, (config.num_query_groups, -1)) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _split(name: str, whole: Tensor, config) -> list[Tensor]:
    if "linear_qkv" in name and "layer_norm" not in name:
        heads = config.num_attention_heads // config.num_query_groups
        joined = whole.unflatten(0, (config.num_query_groups, heads + 2, -1))
        return [part.flatten(0, 2) for part in joined.split([heads, 1, 1], dim=1)]
    return list(whole.chunk(2)) if "linear_fc1" in name and "layer_norm" not in name else [whole]
