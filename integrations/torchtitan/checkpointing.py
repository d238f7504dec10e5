"""Selective activation checkpointing keeps what is expensive to compute again: here the products with their collectives, and attention."""

from dataclasses import dataclass

import torch
from torchtitan.distributed import activation_checkpoint


class SelectiveAC(activation_checkpoint.SelectiveAC):
    """The stock policy recomputes every second product; tpinv's are all kept, since most of them hold a collective."""

    @dataclass(kw_only=True, slots=True)
    class Config(activation_checkpoint.SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set:
        ops = torch.ops.tpinv
        linears = ops.column_parallel_linear, ops.row_parallel_linear
        attention = ops.core_attention, ops.packed_attention, ops.core_attention_with_options, ops.packed_attention_with_options
        return super().get_save_ops() | {op.default for op in (*linears, *attention)}
