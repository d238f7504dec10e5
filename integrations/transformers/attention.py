"""tpinv's attention as an attention implementation of transformers, registered under the name "tpinv".

transformers makes a mask once a forward pass and hands it to every layer. Here the "mask" is a table of which rows of the batch are
whose: int32 [4, n + 1, 1, 1], for n sequences the arguments cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded and cu_seqlens_kv_padded of
packed_attention over the flattened batch; None where every row of the batch is one whole sequence. Four dimensions tell transformers that it is finished: generate
makes it ahead of the forward pass where a cache is static. Padding, on either side, is in no sequence: positions count
from a sequence's first real key, so that a padded row has the bytes it has alone.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from tpinv import functional

NAME = "tpinv"
CAUSAL = (causal_mask_function,)


def register() -> None:
    """Makes ``attn_implementation="tpinv"`` known to transformers. Repeating it changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sequence_table)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others,
) -> tuple[Tensor, None]:
    """query [b, h, sq, d], key and value [b, g, sk, d], attention_mask from :func:`sequence_table` -> [b, sq, h, d]."""
    _refuse(dropout, others)
    dtype = module.o_proj.weight.dtype  # rope in float32 leaves queries and keys wide, and a cache then its values
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attention_mask is None:
        query, key, value = (t.permute(2, 0, 1, 3) for t in (query, key, value))
        return functional.core_attention(query, key, value, scale=scaling).transpose(0, 1), None
    if attention_mask.dtype != torch.int32 or attention_mask.dim() != 4 or len(attention_mask) != 4 or attention_mask.shape[2:] != (1, 1):
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} {attention_mask.dtype} was made elsewhere; tpinv covers causal attention over "
            "sequences, padded or packed: pass the two-dimensional mask of padding, position_ids, or None"
        )
    batch, heads, length, width = query.shape
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    cu_q, cu_k, first_q, first_k = _rows_of(attention_mask)
    out = functional.packed_attention(
        query,
        key,
        value,
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_k,
        cu_seqlens_q_padded=first_q,
        cu_seqlens_kv_padded=first_k,
        max_seqlen_q=length,
        max_seqlen_kv=len(key) // batch,
        scale=scaling,
    )
    return out.view(batch, length, heads, width), None


def sequence_table(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_,
) -> Tensor | None:
    """The table described above. ``attention_mask`` is bool [b, kv_length], True where a key is real.

    Raises:
        ValueError: a mask that is not causal over whole sequences: sliding windows, bidirectional parts, real keys with a gap.
    """
    packed = _packed_sequences(mask_function)
    if packed is not None:
        return _table_of_pack(packed, q_length, kv_length)
    static = isinstance(q_offset, Tensor) or kv_length != q_offset + q_length or kv_offset != 0
    if not static and (attention_mask is None or bool(attention_mask.all())):
        return None
    row = torch.arange(batch_size, device=device)
    if attention_mask is None:
        first, end = torch.zeros_like(row), torch.zeros_like(row) + (q_offset + q_length)
    else:
        real = attention_mask[:, :kv_length].to(device)
        first, count = real.int().argmax(1), real.sum(1)
        end = first + count
        columns = torch.arange(real.shape[1], device=device)
        within = (columns >= first[:, None]) & (columns < end[:, None])
        if not bool((within == real).all()):
            raise ValueError("attention_mask has padding between real tokens; tpinv covers padding on the left and on the right")
    first_query = (first - q_offset).clamp(min=0)
    queries = (end - q_offset).clamp(min=0, max=q_length) - first_query
    queries, keys = queries.clamp(min=0), end - first
    return _table(row * q_length + first_query, queries, batch_size * q_length, row * kv_length + first, keys, batch_size * kv_length)


def _packed_sequences(mask_function) -> Tensor | None:
    """What ``mask_function`` says of packed sequences: [b, s], a number for each token's sequence; None for plain causal attention."""
    if mask_function in CAUSAL:
        return None
    parts = _closure(mask_function, "and_masks.<locals>.and_mask", "mask_functions")
    if parts is not None and len(parts) == 2 and parts[0] in CAUSAL:
        packed = _closure(parts[1], "packed_sequence_mask_function.<locals>.inner_mask", "packed_sequence_mask")
        if packed is not None:
            return packed
    raise ValueError(
        f"the mask {getattr(mask_function, '__qualname__', mask_function)} is not covered: attention is causal, over padded or packed "
        "sequences; sliding windows and masks of one's own are not"
    )


def _closure(function, qualified_name: str, variable: str):
    """The variable that a function inside transformers.masking_utils keeps; None for another function."""
    if getattr(function, "__qualname__", None) != qualified_name or function.__module__ != "transformers.masking_utils":
        return None
    return dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))[variable].cell_contents


def _table_of_pack(packed: Tensor, q_length: int, kv_length: int) -> Tensor:
    if packed.shape[1] != q_length or q_length != kv_length:
        raise ValueError(f"a pack of {packed.shape[1]} tokens cannot be continued from a cache; pass it whole")
    begins = torch.ones_like(packed, dtype=torch.bool)
    begins[:, 1:] = packed[:, 1:] != packed[:, :-1]
    first = begins.flatten().nonzero().squeeze(1)
    count = torch.diff(first, append=first.new_tensor([packed.numel()]))
    return _table(first, count, packed.numel(), first, count, packed.numel())


def _table(first_q: Tensor, queries: Tensor, end_q: int, first_k: Tensor, keys: Tensor, end_k: int) -> Tensor:
    """Of sequences' first rows and lengths [n] each, in batches of ``end_q`` and ``end_k`` rows."""
    pad = torch.nn.functional.pad
    cumulative = [pad(count.cumsum(0), (1, 0)) for count in (queries, keys)]
    return torch.stack([*cumulative, pad(first_q, (0, 1), value=end_q), pad(first_k, (0, 1), value=end_k)]).int()[:, :, None, None]


_rows = WeakTensorKeyDictionary()  # a table's rows, as long as it lives: the same four tensors in every layer, which are then checked once


def _rows_of(table: Tensor) -> tuple[Tensor, ...]:
    if (rows := _rows.get(table)) is None:
        rows = _rows[table] = tuple(row.flatten().clone() for row in table)  # views would keep the table alive
    return rows


DEFAULTS = {"sliding_window": None, "softcap": None, "s_aux": None, "position_bias": None, "output_attentions": None}


def _refuse(dropout: float, others: dict) -> None:
    if dropout:
        raise ValueError(f"attention_dropout={dropout} must be 0: its random numbers depend on the batch")
    for name, default in DEFAULTS.items():
        if others.get(name) not in (default, False):
            raise ValueError(f"{name}={others[name]!r} is not covered by tpinv's attention; leave it at {default!r}")
    if others.get("is_causal") is False:
        raise ValueError("is_causal=False is not covered; tpinv's attention is causal here")
