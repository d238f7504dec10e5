"""``tpinv bench layer``: one decoder layer of Llama-3-8B's widths that decodes, in a CUDA graph: tpinv against the best stock kernels here.

    tpinv        what tpinv's vLLM plugin launches: tree and chain products, paged attention by leaves, norm, rope, SwiGLU
    stock        cuBLAS; with vLLM installed its fused norms, rope and SwiGLU and FlashAttention-3 over the same pages, with splits as it
                 chooses; without vLLM torch's operators and its attention over dense keys

``batch`` requests with ``keys`` keys each. ``ranks``: the shard of one rank, without communication. A layer's weights and cache overflow
the L2 cache. Median over rounds that alternate. One process, one GPU. ``--products``: its four products alone.
"""

import argparse
import csv
import functools
import math
import os
import statistics
import sys

import torch
import torch.nn.functional as F
from rich.console import Console

from tpinv import functional
from tpinv.collectives import Ranks
from tpinv.ops import products
from tpinv.tree import ReductionTree

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, WIDTH, EPS, PAGE = 4096, 14336, 32, 8, 128, 1e-5, 16
SPLITS = 32  # of keys at most: vLLM's own setting inside CUDA graphs, where FlashAttention-3 decides how many it takes
COLUMNS = ("batch", "keys", "ranks", "implementation", "us", "ratio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64], help="layer: requests (default 1 8 32 64)")
    parser.add_argument("--keys", type=int, default=2048, help="layer: keys of each request (default 2048)")
    parser.add_argument("--shard-of", nargs="+", type=int, default=[1, 2], help="layer: ranks that share the layer (default 1 2)")
    parser.add_argument(
        "--products", nargs="*", type=int, help="layer: instead, its four products alone, for so many tokens (default 1 to 128)"
    )


def run(arguments: argparse.Namespace) -> int:
    from tpinv.cli.bench_attention import compare

    console = Console(highlight=False, width=130)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, tpinv bench {' '.join(sys.argv[2:])}")
    with open(arguments.csv or os.devnull, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        if arguments.products is not None:
            _products(arguments, writer, file, console)
            return 0
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


def _products(arguments, writer, file, console: Console) -> None:
    """The layer's products as a rank of ``--shard-of`` computes them, against cuBLAS; weights rotate through more than the L2 cache. A
    row-parallel product leaves its subtrees' values in fp32, which another kernel adds over the ranks."""
    from tpinv.cli.bench_attention import compare

    ratios, tree = [], ReductionTree(8)
    for tokens in arguments.products or (1, 16, 64, 128, 8, 32):
        for size in arguments.shard_of:
            ranks = Ranks(None, 0, size)
            shapes = {
                "qkv": ((HEADS + 2 * KV_HEADS) * WIDTH // size, HIDDEN), "o": (HIDDEN, HEADS * WIDTH // size),
                "gate_up": (2 * INTERMEDIATE // size, HIDDEN), "down": (HIDDEN, INTERMEDIATE // size),
            }  # fmt: skip
            for name, (n, k) in shapes.items():
                a = (torch.randn(tokens, k, device="cuda") * 0.02).bfloat16()
                weights = [(torch.randn(n, k, device="cuda") * 0.02).bfloat16() for _ in range(2 + 200_000_000 // (2 * n * k))]

                def ours(b, name=name, a=a, ranks=ranks):
                    if name in ("qkv", "gate_up"):
                        return products.local_product(a, b.t(), tree, ranks, dim=1, dtype=torch.bfloat16)
                    if ranks.size == 1:
                        return products.sum_product(a, b.t(), a.shape[:1], tree, ranks, False, torch.bfloat16)
                    return products.tree_product(a, b.t(), tree, ranks)

                calls = {
                    "tpinv": [functools.partial(ours, b) for b in weights],
                    "cuBLAS": [functools.partial(F.linear, a, b) for b in weights],
                }
                with torch.inference_mode():
                    times = compare(calls, arguments.milliseconds, arguments.rounds)
                ratios.append(times["cuBLAS"] / times["tpinv"])
                for kind, us in times.items():
                    row = (tokens, name, size, kind, round(us, 2), round(times["cuBLAS"] / us, 3))
                    writer.writerow(dict(zip(COLUMNS, row, strict=True)))
                file.flush()
                console.print(f"tokens {tokens} ranks {size} {name} {n} x {k}: tpinv {times['tpinv']:.1f} us, ratio {ratios[-1]:.3f}")
        console.print(f"so far: median {statistics.median(ratios):.3f}, worst {min(ratios):.3f} of {len(ratios)}")


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
            from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_scheduler_metadata

            plan = get_scheduler_metadata(  # once a step, as in an engine
                batch_size=self.batch, max_seqlen_q=1, max_seqlen_k=self.keys, num_heads_q=self.heads, num_heads_kv=self.kv_heads,
                headdim=WIDTH, cache_seqlens=self.lengths, qkv_dtype=torch.bfloat16, cu_seqlens_q=self.starts, page_size=PAGE, causal=True,
                num_splits=SPLITS,
            )  # fmt: skip
            attention = functools.partial(flash_attn_varlen_func, scheduler_metadata=plan, num_splits=SPLITS, fa_version=3)
            self.vllms(attention)
            found["stock: vLLM"] = lambda: self.vllms(attention)
        except Exception as error:  # of whatever version is here: the other rows are still true
            print(f"vLLM's kernels do not run here: {type(error).__name__}: {error}", file=sys.stderr)
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
        add_norm = products.rows_backend("add_norm", self.hidden).add_norm
        x, residual = add_norm(self.hidden, self.residual, self.norms[0], EPS)
        q, k, v = products.local_product(x, self.qkv.t(), tree, ranks, **alone).split(self.splits, -1)
        products.rows_backend("rope", q).rotate(q, k, self.positions, self.rope_cache, WIDTH)
        heads = lambda t: t.view(self.batch, -1, WIDTH)  # noqa: E731
        views = self.cache.transpose(1, 2).split(WIDTH, -1)
        functional.append_kv(heads(k), heads(v), *views, self.slots)
        tables = {"block_table": self.table, "seq_lens": self.lengths, "query_start_loc": self.starts}
        y = functional.paged_attention(heads(q), *views, **tables, max_query_len=1, max_seq_len=self.keys)
        y = functional.row_parallel_linear(y.view(self.batch, -1), self.o, tree=tree, group=ranks)
        x, residual = add_norm(y, residual, self.norms[1], EPS)
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
            max_seqlen_k=self.keys, softmax_scale=WIDTH**-0.5, causal=True, block_table=self.table,
        )  # fmt: skip
        x = F.linear(y.view(self.batch, -1), self.o)
        _custom_ops.fused_add_rms_norm(x, residual, self.norms[1], EPS)
        x = F.linear(x, self.gate_up)
        inner = x.new_empty(self.batch, x.shape[1] // 2)
        torch.ops._C.silu_and_mul(inner, x)
        return F.linear(inner, self.down), residual
