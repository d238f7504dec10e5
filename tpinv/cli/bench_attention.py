"""``tpinv bench attention``: prefill, backward and paged decode against the fastest that are free to choose their splits, alternating in
one run, after the bits were checked.

Others, where they are installed: FlashAttention-3 as vLLM brings it (its splits free, with the plan of them made ahead as vLLM makes it once
a step, and ``num_splits=1``), FlashInfer, and torch's cuDNN and FlashAttention-2, which have no pages and get dense keys.

Ours is one set of bytes: before anything is timed, a shape's last rows are computed by decode over pages and compared with the prefill. Then
twins, which must differ: a request's row by FlashAttention-3 alone and in a batch, torch's decode and its prefill. Every time
is the median over rounds in which all implementations run one after the other, captured in CUDA graphs. A decode takes its cache in turn from
copies that overflow the L2 cache, as the layers of a model do. ``hbm`` is the share of 3.35 TB/s (H100) at which a decode's keys and values
are read. One process, one GPU.
"""

import argparse
import csv
import datetime
import functools
import importlib
import os
import statistics
import sys

import torch
from rich.console import Console
from rich.table import Table

from tpinv.harness.outputs import write_json

COLUMNS = ("what", "batch", "queries", "keys", "heads", "key_heads", "width", "page", "implementation", "us", "ratio", "tflops", "hbm")
PREFILL = (1024, 2048, 4096, 8192, 16384, 32768)
BACKWARD = (4096, 16384)
# batch, keys, heads, key heads; first those that docs/benchmarks-attention.md has goals for
DECODE = (
    (8, 8192, 32, 8), (1, 32768, 32, 8), (1, 8192, 32, 8), (1, 1024, 32, 8), (1, 32768, 4, 1), (64, 2048, 32, 8), (1, 131072, 32, 8),
    (8, 1024, 32, 8), (64, 1024, 32, 8), (8, 32768, 32, 8), (64, 8192, 32, 8),
    (1, 1024, 16, 4), (1, 8192, 16, 4), (1, 32768, 16, 4), (1, 131072, 16, 4), (8, 1024, 16, 4), (8, 8192, 16, 4), (8, 32768, 16, 4),
    (64, 1024, 16, 4), (64, 8192, 16, 4),
    (1, 1024, 4, 1), (1, 8192, 4, 1), (1, 131072, 4, 1), (8, 1024, 4, 1), (8, 8192, 4, 1), (8, 32768, 4, 1), (8, 131072, 4, 1),
    (64, 1024, 4, 1), (64, 8192, 4, 1), (64, 32768, 4, 1),
)  # fmt: skip
BANDWIDTH = 3.35e12  # of an H100's memory, by its data sheet
COLD = 150_000_000  # bytes that overflow the L2 cache
BACKENDS = {"cuDNN": "CUDNN_ATTENTION", "FA2": "FLASH_ATTENTION"}
FA3, FA3_UNSPLIT, FLASHINFER = "FA3", "FA3 num_splits=1", "FlashInfer"
OTHERS = (FA3, FA3_UNSPLIT, FLASHINFER, *BACKENDS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefill", nargs="*", type=int, default=PREFILL, help="attention: lengths of a causal prefill")
    parser.add_argument("--backward", nargs="*", type=int, default=BACKWARD, help="attention: lengths of a causal backward")
    parser.add_argument(
        "--decode", nargs="*", default=[",".join(map(str, case)) for case in DECODE], help="attention: batch,keys,heads,key heads"
    )
    parser.add_argument("--width", type=int, default=128, help="attention: of a head (default 128)")
    parser.add_argument("--page", type=int, default=16, help="attention: positions of a page (default 16)")
    parser.add_argument("--json", help="attention: write machine, twins and rows to this file")


def run(arguments: argparse.Namespace) -> int:
    import triton

    decode = [tuple(map(int, case.split(","))) for case in arguments.decode]
    if any(len(case) != 4 for case in decode):
        raise ValueError(f"--decode {' '.join(arguments.decode)}: each is batch,keys,heads,key heads, such as 8,8192,32,8")
    console = Console(highlight=False, width=150)
    machine = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda}, bf16, "
        f"{datetime.date.today()}, tpinv bench {' '.join(sys.argv[2:])}"
    )
    console.print(machine)
    for name, made in ((FA3, flash_attention_3), (FLASHINFER, flashinfer)):
        if made() is None:
            console.print(f"{name} is not installed: its column stays empty")
    moved = twins()
    console.print(*(f"twin {name}: {count} of {of} rows differ" for name, (count, of) in moved.items()), sep="\n")
    rows = []
    with open(arguments.csv or os.devnull, "w", newline="") as file:  # as they come: a run may be cut off
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        cases = [Decode(*case, arguments.width, arguments.page) for case in decode]
        lengths = sorted({*arguments.prefill, *arguments.backward})
        cases += [Prefill(n, 32, 8, arguments.width, n in arguments.prefill, n in arguments.backward) for n in lengths]
        for case in cases:
            try:
                found = case.measure(arguments.milliseconds, arguments.rounds)
            except torch.cuda.OutOfMemoryError:
                console.print(f"{case}: does not fit into this GPU's memory")
                found = []
            for row in found:
                writer.writerow(row)
                file.flush()
                rows.append(row)
                console.print(*(f"{row[name]}" for name in COLUMNS))
            if arguments.json:
                write_json(arguments.json, {"machine": machine, "twins": moved, "rows": rows})
            torch.cuda.empty_cache()
    console.print(table(rows))
    return 0


# -- others -------------------------------------------------------------------------------------------------------------------------


@functools.cache
def flash_attention_3():
    """The module of vLLM with FlashAttention-3; None where it is not."""
    try:
        found = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    except ImportError:
        return None
    return found if found.FA3_AVAILABLE else None


@functools.cache
def flashinfer():
    try:
        return importlib.import_module("flashinfer")
    except ImportError:
        return None


def fa3_prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, splits: int = 0) -> torch.Tensor:
    """A causal sequence, q [n, h, d], k and v [n, g, d]."""
    starts = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    call = flash_attention_3().flash_attn_varlen_func
    return functools.partial(call, q, k, v, len(q), starts, len(k), cu_seqlens_k=starts, causal=True, fa_version=3, num_splits=splits)


def fa3_decode(query, cache, table, lens, starts, longest: int, splits: int):
    """A function of a cache [pages, 2, page, g, d]: one query [b, h, d] of each request."""
    module, (batch, heads, width), (_, _, page, groups, _) = flash_attention_3(), query.shape, cache.shape
    planned = module.get_scheduler_metadata(
        batch, 1, longest, heads, groups, width, lens, query.dtype, cu_seqlens_q=starts, page_size=page, causal=True, num_splits=splits
    )
    out = torch.empty_like(query)
    return lambda cache: module.flash_attn_varlen_func(
        query, *cache.unbind(1), 1, starts, longest, seqused_k=lens, block_table=table, causal=True, out=out, fa_version=3,
        num_splits=splits, scheduler_metadata=planned,
    )  # fmt: skip


def flashinfer_decode(query, cache, table, keys: int):
    """The same by FlashInfer; its plan is made ahead."""
    (batch, heads, width), (_, _, page, groups, _) = query.shape, cache.shape
    space = torch.empty(256 << 20, dtype=torch.uint8, device=query.device)
    pages = table.shape[1]
    wrapper = flashinfer().BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    starts = torch.arange(0, batch * pages + 1, pages, dtype=torch.int32, device=query.device)
    last = torch.full((batch,), keys - (pages - 1) * page, dtype=torch.int32, device=query.device)
    wrapper.plan(starts, table.flatten(), last, heads, groups, width, page, q_data_type=query.dtype, kv_data_type=cache.dtype)
    out = torch.empty_like(query)
    return lambda cache: wrapper.run(query, cache, out=out)


def stock(backend: str, *arguments, **settings):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, BACKENDS[backend])):
        return torch.nn.functional.scaled_dot_product_attention(*arguments, **settings)


def twins() -> dict[str, tuple[int, int]]:
    """Rows of others that differ, out of how many: a batch's requests by FlashAttention-3 alone and together, the last row by torch's decode
    and prefill. Nobody promises otherwise; it shows that the checks of ours can fail."""
    found = {}
    if flash_attention_3() is not None:
        case = Decode(16, 6000, 32, 8, 128, 16)
        copies, order, lens, starts = case.caches()
        query = randn(16, 32, 128)
        together = fa3_decode(query, copies[0], order, lens, starts, 6000, 0)(copies[0]).clone()
        alone = [
            fa3_decode(query[i : i + 1], copies[0], order[i : i + 1], lens[:1], starts[:2], 6000, 0)(copies[0]).clone() for i in range(16)
        ]
        found["FA3, alone and in a batch"] = _rows_that_differ(torch.cat(alone), together), 16
    q, k, v = (randn(1, heads, 9000, 128) for heads in (32, 8, 8))
    for name in BACKENDS:
        try:
            whole = stock(name, q, k, v, is_causal=True, enable_gqa=True)[:, :, -1]
            last = stock(name, q[:, :, -1:], k, v, enable_gqa=True)[:, :, 0]
        except RuntimeError:
            continue
        found[f"{name}, decode and prefill"] = _rows_that_differ(last[0], whole[0]), 32
    return found


def _rows_that_differ(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.contiguous().view(torch.int16) != b.contiguous().view(torch.int16)).flatten(1).any(1).sum())


# -- ours -----------------------------------------------------------------------------------------------------------------------------


def compare(calls: dict[str, list], milliseconds: float, rounds: int, eager: bool = False) -> dict[str, float]:
    """Microseconds of each, alternating, as graphs or ``eager``. What cannot run here is left out."""
    from tpinv.cli.bench import _Timed

    timed = {}
    for name, launches in calls.items():
        try:
            timed[name] = _Eager(launches) if eager else _Timed(launches)
        except RuntimeError as error:  # torch has no kernel of that name for this shape
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
    times = {name: [] for name in timed}
    for _ in range(rounds):
        for name, call in timed.items():
            times[name].append(call(milliseconds))
    return {name: statistics.median(values) for name, values in times.items()}


class _Eager:
    """What a CUDA graph cannot hold, such as torch's backward of cuDNN's attention, one call after another: for kernels so long that the
    host keeps ahead of them."""

    def __init__(self, launches):
        self.launches = launches
        self(1.0)

    def __call__(self, milliseconds: float) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        calls = max(10, len(self.launches))
        start.record()
        for i in range(calls):
            self.launches[i % len(self.launches)]()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


class Prefill:
    """A causal sequence, forward and backward."""

    def __init__(self, length: int, heads: int, key_heads: int, width: int, forward: bool = True, backward: bool = True):
        self.length, self.heads, self.key_heads, self.width, self.forward, self.backward = (
            length,
            heads,
            key_heads,
            width,
            forward,
            backward,
        )

    def __str__(self) -> str:
        return f"prefill of {self.length}"

    def measure(self, milliseconds: float, rounds: int) -> list[dict]:
        from tpinv.kernels.attention import backward, forward

        q, k, v, dout = (randn(self.length, 1, heads, self.width) for heads in (self.heads, self.key_heads, self.key_heads, self.heads))
        scale = self.width**-0.5
        out, lse = forward.forward(q, k, v, scale, True)
        again, _ = forward.forward(q[-100:], k, v, scale, True)
        require(again, out[-100:], f"the last 100 of {self.length} queries")
        dense = [t.permute(1, 2, 0, 3).contiguous().requires_grad_() for t in (q, k, v)]
        flops = 2.0 * self.length**2 * self.width * self.heads
        rows = []
        if self.forward:
            calls = {"tpinv": [lambda: forward.forward(q, k, v, scale, True)]}
            if flash_attention_3() is not None:
                calls[FA3] = [fa3_prefill(*(t[:, 0] for t in (q, k, v)))]
            calls |= {name: [lambda name=name: stock(name, *dense, is_causal=True, enable_gqa=True)] for name in BACKENDS}
            rows += self._rows("prefill", compare(calls, milliseconds, rounds), flops)
        if self.backward:
            gradients = backward.backward(q, k, v, out, lse, dout, scale, True)
            one = backward.backward(
                *(t[:, :, :n] for t, n in zip((q, k, v, out), (4, 1, 1, 4), strict=True)), lse[:, :4], dout[:, :, :4], scale, True
            )
            for name, whole, part in zip(("dq", "dk", "dv"), gradients, one, strict=True):
                require(part, whole[:, :, : part.shape[2]], f"{name} of one key head and of all")
            calls = {"tpinv": [lambda: backward.backward(q, k, v, out, lse, dout, scale, True)]}
            gradient = dout.permute(1, 2, 0, 3).contiguous()

            def of(name: str):
                outs = stock(name, *dense, is_causal=True, enable_gqa=True)
                return [lambda: torch.autograd.grad(outs, dense, gradient, retain_graph=True)]

            rows += self._rows(
                "backward", compare(calls | {name: of(name) for name in BACKENDS}, milliseconds, rounds, eager=True), 2.5 * flops
            )
        return rows

    def _rows(self, what: str, times: dict[str, float], flops: float) -> list[dict]:
        shape = what, 1, self.length, self.length, self.heads, self.key_heads, self.width, ""
        return [line(shape, name, us, times["tpinv"], tflops=round(flops / us / 1e6, 1)) for name, us in times.items()]


class Decode:
    """One query of each request over pages."""

    def __init__(self, batch: int, keys: int, heads: int, key_heads: int, width: int, page: int):
        self.batch, self.keys, self.heads, self.key_heads, self.width, self.page = batch, keys, heads, key_heads, width, page
        self.bytes = 4 * batch * keys * key_heads * width

    def __str__(self) -> str:
        return f"decode of {self.batch} x {self.keys}"

    def caches(self) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies of [pages, 2, page, g, d] with shuffled pages, the table, lengths and starts."""
        pages = self.batch * -(-self.keys // self.page)
        copies = [randn(pages, 2, self.page, self.key_heads, self.width) for _ in range(max(1, -(-COLD // self.bytes)))]
        order = torch.randperm(pages, device="cuda").int().view(self.batch, -1)
        lens = torch.full((self.batch,), self.keys, dtype=torch.int32, device="cuda")
        return copies, order, lens, torch.arange(self.batch + 1, dtype=torch.int32, device="cuda")

    def measure(self, milliseconds: float, rounds: int) -> list[dict]:
        from tpinv.kernels.attention import forward, paged

        copies, order, lens, starts = self.caches()
        query, scale = randn(self.batch, self.heads, self.width), self.width**-0.5
        out = torch.empty_like(query)

        def ours(copy: torch.Tensor) -> None:
            paged.forward(query, *copy.unbind(1), order, lens, starts, 1, self.keys, scale, True, out)

        ours(copies[0])
        keys, values = (copies[0][order[-1].long()][:, i].flatten(0, 1)[: self.keys].unsqueeze(1) for i in (0, 1))
        rows = torch.cat([randn(70, self.heads, self.width), query[-1:]]).unsqueeze(1)
        expected, _ = forward.forward(rows, keys, values, scale, True)
        require(out[-1:], expected[-1], f"a decode of {self.keys} keys and the prefill of its last 71 queries")
        calls = {"tpinv": [functools.partial(ours, copy) for copy in copies]}
        others = {}
        if flash_attention_3() is not None:
            others |= {name: fa3_decode(query, copies[0], order, lens, starts, self.keys, n) for name, n in ((FA3, 0), (FA3_UNSPLIT, 1))}
        if flashinfer() is not None:
            others[FLASHINFER] = flashinfer_decode(query, copies[0], order, self.keys)
        calls |= {name: [functools.partial(call, copy) for copy in copies] for name, call in others.items()}
        size = self.batch * 2 * self.key_heads * self.keys * self.width  # pages may have more room
        dense = [copy.view(-1)[:size].view(self.batch, 2, self.key_heads, self.keys, self.width).unbind(1) for copy in copies]
        single = query.view(self.batch, self.heads, 1, self.width)
        for name in BACKENDS:
            calls[name] = [lambda k=k, v=v, name=name: stock(name, single, k, v, enable_gqa=True) for k, v in dense]
        times = compare(calls, milliseconds, rounds)
        shape = "decode", self.batch, 1, self.keys, self.heads, self.key_heads, self.width, self.page
        return [line(shape, name, us, times["tpinv"], hbm=round(self.bytes / us * 1e6 / BANDWIDTH, 3)) for name, us in times.items()]


def require(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    from tpinv.ops.attention import same_bytes

    if not same_bytes(found, expected):
        raise RuntimeError(f"bytes differ: {what}; nothing was timed")


def line(shape: tuple, name: str, us: float, ours: float, tflops="", hbm="") -> dict:
    """``ratio``: this implementation's time over ours."""
    return dict(zip(COLUMNS, (*shape, name, round(us, 2), round(us / ours, 3), tflops, hbm), strict=True))


def table(rows: list[dict]) -> Table:
    made = Table(title="their time / ours", title_justify="left")
    names = ["tpinv", *OTHERS]
    for column in ("what", "batch", "keys", "heads", "tpinv us", "share of HBM", *OTHERS):
        made.add_column(column, justify="right")
    seen: dict[tuple, dict] = {}
    for row in rows:
        seen.setdefault(tuple(row[name] for name in COLUMNS[:8]), {})[row["implementation"]] = row
    for (what, batch, _, keys, heads, key_heads, *_), found in seen.items():
        ours = found["tpinv"]
        ratios = [str(found[name]["ratio"]) if name in found else "" for name in names[1:]]
        made.add_row(what, str(batch), str(keys), f"{heads}/{key_heads}", str(ours["us"]), str(ours["hbm"]), *ratios)
    return made
