"""``tpinv bench layer``: one decoder layer of Llama-3-8B's widths that decodes, in a CUDA graph: tpinv against the best stock kernels here.

    tpinv        what tpinv's vLLM plugin launches: tree and chain products, paged attention by leaves, norm, rope, SwiGLU
    stock        cuBLAS; with vLLM installed its fused norms, rope and SwiGLU and FlashAttention-3 over the same pages, with splits as it
                 chooses; without vLLM torch's operators and its attention over dense keys

``batch`` requests with ``keys`` keys each. ``ranks``: the shard of one rank, without communication. A layer's weights and cache overflow
the L2 cache. Median over rounds that alternate. One process, one GPU.
"""

import argparse
import csv
import math
import os
import sys

import torch
import torch.nn.functional as F
from rich.console import Console

from tpinv import functional
from tpinv.collectives import Ranks
from tpinv.ops import products
from tpinv.tree import ReductionTree

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, WIDTH, EPS, PAGE = 4096, 14336, 32, 8, 128, 1e-5, 16
COLUMNS = ("batch", "keys", "ranks", "implementation", "us", "ratio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64], help="layer: requests (default 1 8 32 64)")
    parser.add_argument("--keys", type=int, default=2048, help="layer: keys of each request (default 2048)")
    parser.add_argument("--shard-of", nargs="+", type=int, default=[1, 2], help="layer: ranks that share the layer (default 1 2)")


def run(arguments: argparse.Namespace) -> int:
    from tpinv.cli.bench_attention import compare

    console = Console(highlight=False, width=130)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, tpinv bench {' '.join(sys.argv[2:])}")
    with open(arguments.csv or os.devnull, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for ranks in arguments.shard_of:
            for batch in arguments.batch:
                layer = Layer(batch, arguments.keys, ranks)
                with torch.inference_mode():
                    calls = {name: [call] for name, call in layer.implementations().items()}
                    times = compare(calls, arguments.milliseconds, arguments.rounds)
                stock = min((us for name, us in times.items() if name != "tpinv"), default=math.nan)
                for name, us in times.items():
                    row = (batch, arguments.keys, ranks, name, round(us, 2), round(stock / us, 3))
                    writer.writerow(dict(zip(COLUMNS, row, strict=True)))
                    file.flush()
                    console.print(*(f"{column} {value}" for column, value in zip(COLUMNS, row, strict=True)))
    return 0


class Layer:
    """The operands of one layer, and its implementations: functions of no arguments that leave the hidden states of a step behind."""

    def __init__(self, batch: int, keys: int, ranks: int):
        self.heads, self.kv_heads, self.tree = HEADS // ranks, KV_HEADS // ranks, ReductionTree(8)
        make = lambda *shape: (torch.randn(*shape, device="cuda") * 0.02).bfloat16()  # noqa: E731
        q, kv, inner = self.heads * WIDTH, self.kv_heads * WIDTH, INTERMEDIATE // ranks
        self.qkv, self.o, self.gate_up, self.down = make(q + 2 * kv, HIDDEN), make(HIDDEN, q), make(2 * inner, HIDDEN), make(HIDDEN, inner)
        self.norms = [make(HIDDEN) + 1 for _ in range(2)]
        self.hidden, self.residual = make(batch, HIDDEN), make(batch, HIDDEN)
        self.splits, self.ranks = (q, kv, kv), Ranks(None, 0, 1)
        pages = -(-keys // PAGE)
        self.cache = make(batch * pages, self.kv_heads, PAGE, 2 * WIDTH)
        order = torch.randperm(batch * pages, device="cuda").view(batch, pages)
        self.table, self.lengths = order.int(), torch.full((batch,), keys, dtype=torch.int32, device="cuda")
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        self.slots = order[:, (keys - 1) // PAGE] * PAGE + (keys - 1) % PAGE
        self.positions = torch.full((batch,), keys - 1, device="cuda")
        self.keys, self.batch, self.one = keys, batch, torch.ones((), device="cuda")
        self.dense = [make(batch, self.kv_heads, keys, WIDTH) for _ in range(2)]
        angles = torch.outer(torch.arange(keys, device="cuda").float(), 1e4 ** (-torch.arange(0, WIDTH, 2, device="cuda") / WIDTH))
        self.rope_cache = torch.cat([angles.cos(), angles.sin()], -1).bfloat16()

    def implementations(self) -> dict:
        found = {"tpinv": self.ours, "stock: torch": self.torchs}
        try:
            from vllm import _custom_ops  # noqa: F401
            from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

            found["stock: vLLM"] = lambda: self.vllms(flash_attn_varlen_func)
        except ImportError as error:
            print(f"vLLM's kernels are not here: {error}", file=sys.stderr)
        return found

    def _rope(self, q, k):
        try:
            from vllm import _custom_ops

            _custom_ops.rotary_embedding(self.positions, q, k, WIDTH, self.rope_cache, True)
            return q, k
        except (ImportError, AttributeError):
            cos, sin = self.rope_cache[self.positions].unsqueeze(1).chunk(2, -1)
            turned = []
            for x in (q, k):
                first, second = x.view(len(x), -1, WIDTH).chunk(2, -1)
                turned.append(torch.cat((first * cos - second * sin, second * cos + first * sin), -1).view(len(x), -1))
            return turned

    def ours(self):
        tree, ranks, alone = self.tree, self.ranks, {"dim": 1, "dtype": torch.bfloat16}
        residual = self.hidden + self.residual
        x = functional.rms_norm(residual, self.norms[0], EPS, tree=tree)
        q, k, v = products.local_product(x, self.qkv.t(), tree, ranks, **alone).split(self.splits, -1)
        q, k = self._rope(q, k)
        heads = lambda t: t.reshape(self.batch, -1, WIDTH)  # noqa: E731
        views = self.cache.transpose(1, 2).split(WIDTH, -1)
        functional.append_kv(heads(k), heads(v), *views, self.slots)
        tables = {"block_table": self.table, "seq_lens": self.lengths, "query_start_loc": self.starts}
        y = functional.paged_attention(heads(q), *views, **tables, max_query_len=1, max_seq_len=self.keys)
        y = functional.row_parallel_linear(y.view(self.batch, -1), self.o, tree=tree, group=ranks)
        residual = y + residual
        x = functional.rms_norm(residual, self.norms[1], EPS, tree=tree)
        x = functional.swiglu(products.local_product(x, self.gate_up.t(), tree, ranks, **alone))
        return functional.row_parallel_linear(x, self.down, tree=tree, group=ranks), residual

    def torchs(self):
        residual = self.hidden + self.residual
        q, k, v = F.linear(F.rms_norm(residual, (HIDDEN,), self.norms[0], EPS), self.qkv).split(self.splits, -1)
        q, k = self._rope(q, k)
        y = F.scaled_dot_product_attention(q.reshape(self.batch, self.heads, 1, WIDTH), *self.dense, enable_gqa=True)
        residual = F.linear(y.reshape(self.batch, -1), self.o) + residual
        gate, up = F.linear(F.rms_norm(residual, (HIDDEN,), self.norms[1], EPS), self.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down), residual

    def vllms(self, attention):
        from vllm import _custom_ops

        x, residual = self.hidden.clone(), self.residual.clone()
        _custom_ops.fused_add_rms_norm(x, residual, self.norms[0], EPS)
        q, k, v = F.linear(x, self.qkv).split(self.splits, -1)
        q, k = self._rope(q, k)
        heads = lambda t: t.view(self.batch, -1, WIDTH)  # noqa: E731
        views = self.cache.transpose(1, 2).split(WIDTH, -1)
        torch.ops._C_cache_ops.reshape_and_cache_flash(heads(k), heads(v), *views, self.slots, "auto", self.one, self.one)
        y = torch.empty_like(heads(q))
        attention(
            q=heads(q), k=views[0], v=views[1], out=y, cu_seqlens_q=self.starts, max_seqlen_q=1, seqused_k=self.lengths,
            max_seqlen_k=self.keys, softmax_scale=WIDTH**-0.5, causal=True, block_table=self.table, fa_version=3,
        )  # fmt: skip
        x = F.linear(y.view(self.batch, -1), self.o)
        _custom_ops.fused_add_rms_norm(x, residual, self.norms[1], EPS)
        x = F.linear(x, self.gate_up)
        inner = x.new_empty(self.batch, x.shape[1] // 2)
        torch.ops._C.silu_and_mul(inner, x)
        return F.linear(inner, self.down), residual
