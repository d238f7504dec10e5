"""``tpinv bench attention``: prefill, backward and paged decode against torch's own attention (cuDNN, FlashAttention-2), alternating in one
run, after the bits were checked.

Ours is one set of bytes: before anything is timed, a shape's last rows are computed by decode over pages and compared with the prefill.
Every time is the median over rounds in which all implementations run one after the other, captured in CUDA graphs. A decode takes its
cache in turn from copies that overflow the L2 cache, as the layers of a model do. torch's attention has no pages: it gets dense keys.
``hbm`` is the share of 3.35 TB/s (H100) at which a decode's keys and values are read. One process, one GPU.
"""

import argparse
import csv
import datetime
import os
import statistics
import sys

import torch
from rich.console import Console
from rich.table import Table

COLUMNS = ("what", "batch", "queries", "keys", "heads", "key_heads", "width", "page", "implementation", "us", "ratio", "tflops", "hbm")
PREFILL = (1024, 4096, 16384)
# batch, keys, heads, key heads
DECODE = (
    (1, 1024, 32, 8), (1, 8192, 32, 8), (1, 32768, 32, 8), (1, 131072, 32, 8), (8, 8192, 32, 8), (64, 2048, 32, 8), (64, 8192, 32, 8),
    (1, 32768, 4, 1), (8, 32768, 4, 1), (64, 8192, 4, 1), (8, 8192, 16, 4),
)  # fmt: skip
BANDWIDTH = 3.35e12  # of an H100's memory, by its data sheet
COLD = 150_000_000  # bytes that overflow the L2 cache
BACKENDS = {"cuDNN": "CUDNN_ATTENTION", "FA2": "FLASH_ATTENTION"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefill", nargs="*", type=int, default=PREFILL, help="attention: lengths of a causal prefill and its backward")
    parser.add_argument(
        "--decode", nargs="*", default=[",".join(map(str, case)) for case in DECODE], help="attention: batch,keys,heads,key heads"
    )
    parser.add_argument("--width", type=int, default=128, help="attention: of a head (default 128)")
    parser.add_argument("--page", type=int, default=16, help="attention: positions of a page (default 16)")


def run(arguments: argparse.Namespace) -> int:
    import triton

    decode = [tuple(map(int, case.split(","))) for case in arguments.decode]
    if any(len(case) != 4 for case in decode):
        raise ValueError(f"--decode {' '.join(arguments.decode)}: each is batch,keys,heads,key heads, such as 8,8192,32,8")
    console = Console(highlight=False, width=150)
    console.print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda}, bf16, "
        f"{datetime.date.today()}, tpinv bench {' '.join(sys.argv[2:])}"
    )
    rows = []
    with open(arguments.csv or os.devnull, "w", newline="") as file:  # as they come: a run may be cut off
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        cases = [Prefill(length, 32, 8, arguments.width) for length in arguments.prefill]
        cases += [Decode(*case, arguments.width, arguments.page) for case in decode]
        for case in cases:
            for found in case.measure(arguments.milliseconds, arguments.rounds):
                writer.writerow(found)
                file.flush()
                rows.append(found)
                console.print(*(f"{found[name]}" for name in COLUMNS))
    console.print(table(rows))
    return 0


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


def stock(backend: str, *arguments, **settings):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, BACKENDS[backend])):
        return torch.nn.functional.scaled_dot_product_attention(*arguments, **settings)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


class Prefill:
    """A causal sequence, forward and backward."""

    def __init__(self, length: int, heads: int, key_heads: int, width: int):
        self.length, self.heads, self.key_heads, self.width = length, heads, key_heads, width

    def measure(self, milliseconds: float, rounds: int) -> list[dict]:
        from tpinv.kernels.attention import backward, forward

        q, k, v, dout = (randn(self.length, 1, heads, self.width) for heads in (self.heads, self.key_heads, self.key_heads, self.heads))
        scale = self.width**-0.5
        out, lse = forward.forward(q, k, v, scale, True)
        again, _ = forward.forward(q[-100:], k, v, scale, True)
        require(again, out[-100:], f"the last 100 of {self.length} queries")
        dense = [t.permute(1, 2, 0, 3).contiguous().requires_grad_() for t in (q, k, v)]
        ours = {"tpinv": [lambda: forward.forward(q, k, v, scale, True)]}
        calls = {name: [lambda name=name: stock(name, *dense, is_causal=True, enable_gqa=True)] for name in BACKENDS}
        flops = 2.0 * self.length**2 * self.width * self.heads
        rows = self._rows("prefill", compare(ours | calls, milliseconds, rounds), flops)

        def of(name: str):
            outs = stock(name, *dense, is_causal=True, enable_gqa=True)
            gradient = dout.permute(1, 2, 0, 3).contiguous()
            return [lambda: torch.autograd.grad(outs, dense, gradient, retain_graph=True)]

        ours = {"tpinv": [lambda: backward.backward(q, k, v, out, lse, dout, scale, True)]}
        return rows + self._rows(
            "backward", compare(ours | {name: of(name) for name in BACKENDS}, milliseconds, rounds, eager=True), 2.5 * flops
        )

    def _rows(self, what: str, times: dict[str, float], flops: float) -> list[dict]:
        shape = what, 1, self.length, self.length, self.heads, self.key_heads, self.width, ""
        return [line(shape, name, us, times["tpinv"], tflops=round(flops / us / 1e6, 1)) for name, us in times.items()]


class Decode:
    """One query of each request over pages."""

    def __init__(self, batch: int, keys: int, heads: int, key_heads: int, width: int, page: int):
        self.batch, self.keys, self.heads, self.key_heads, self.width, self.page = batch, keys, heads, key_heads, width, page
        self.bytes = 4 * batch * keys * key_heads * width

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
        calls = {"tpinv": [lambda copy=copy: ours(copy) for copy in copies]}
        dense = [copy.view(self.batch, 2, self.key_heads, self.keys, self.width).unbind(1) for copy in copies]
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
    names = ["tpinv", *BACKENDS]
    for column in ("what", "batch", "keys", "heads", "tpinv us", "share of HBM", *BACKENDS):
        made.add_column(column, justify="right")
    seen: dict[tuple, dict] = {}
    for row in rows:
        seen.setdefault(tuple(row[name] for name in COLUMNS[:8]), {})[row["implementation"]] = row
    for (what, batch, _, keys, heads, key_heads, *_), found in seen.items():
        ours = found["tpinv"]
        ratios = [str(found[name]["ratio"]) if name in found else "" for name in names[1:]]
        made.add_row(what, str(batch), str(keys), f"{heads}/{key_heads}", str(ours["us"]), str(ours["hbm"]), *ratios)
    return made
