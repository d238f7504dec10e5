"""Times a training step of Llama-3-8B's layers, stock against tpinv, after comparing the bytes of one GPU with those of all of them.

    torchrun --nproc_per_node 2 -m tpinv.harness.torchtitan.bench --layers 4 --tokens 4096

One sequence, bf16 parameters, sequence parallelism, AdamW, backend spmd_types without FSDP (so torch 2.11 will do). Eager, and with every
block compiled under selective checkpointing; each as it is, and with forward and backward in a CUDA graph by the Trainer's own wrapper
(stock's default; the override leaves it off in the Trainer). Stock attention is torch's fastest SDPA, or FlexAttention, in whose place tpinv computes packed documents. Rank 0 alone
computes TP = 1. Exit status 1 when tpinv's bytes differ. Parts beyond ``--seconds`` are left out, and stock parts that torch cannot run.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import os
import statistics
import sys
import time

from tpinv.harness.torchtitan import verify  # isort: skip  # before torchtitan
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.config import ParallelismConfig, apply_overrides
from torchtitan.config.override import OverrideConfig
from torchtitan.distributed import utils
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.distributed.cudagraph import cudagraph_teardown, wrap_with_cuda_graph
from torchtitan.distributed.spmd_types import set_current_spmd_mesh
from torchtitan.models import llama3
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.tools.utils import set_default_dtype

from tpinv.collectives import Ranks
from tpinv.harness.torchtitan.recipe import OVERRIDE
from tpinv.integrations.torchtitan import checkpointing, clip
from tpinv.integrations.torchtitan.loss import CrossEntropyLoss as InvariantLoss
from tpinv.ops.registry import ALONE
from tpinv.testing.text import real_text

RECORDED = 3  # steps whose bytes are compared
MODES = {"eager": "", "graph": ", CUDA graph", "compiled": ", compiled", "compiled-graph": ", compiled, CUDA graph"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where there is no GPU the flow can be tried, with a debug model


class Dims:
    """What modules ask of ParallelDims, for tensor parallelism over all ranks."""

    dp_replicate = dp_shard = cp = ep = pp = 1
    spmd_backend = "spmd_types"

    def __init__(self, tp: int):
        self.tp = tp
        self.mesh = dist.init_device_mesh(DEVICE, (1, 1, tp), mesh_dim_names=("dp", "cp", "tp"))

    def get_optional_mesh(self, axes, **_):
        return self.mesh[axes if isinstance(axes, str) else tuple(axes)]


class Model:
    """A model, its loss and its optimizer on this rank."""

    def __init__(self, arguments, layers: str, dims: Dims | None, mode: str):
        self.before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
        self.context = contextlib.nullcontext if dims is None else lambda: set_current_spmd_mesh(dims.mesh)
        tp = dims.tp if dims else 1
        config = llama3.model_registry(arguments.flavor, attn_backend="flex").model
        config.layers = config.layers[: arguments.layers]
        for layer in config.layers:
            if arguments.attention == "sdpa":
                layer.attention.inner_attention = ScaledDotProductAttention.Config()
            layer.attention.rope = dataclasses.replace(layer.attention.rope, max_seq_len=arguments.tokens)
        parallelism = ParallelismConfig(tensor_parallel_degree=tp)
        config.update_from_config(config=dataclasses.make_dataclass("Settings", [("parallelism", ParallelismConfig)])(parallelism))
        if layers == "tpinv":
            apply_overrides(OverrideConfig(imports=[OVERRIDE]), config)
        torch.manual_seed(0)
        with torch.device("meta"), set_default_dtype(torch.bfloat16):
            self.model = config.build()
        if dims is not None:
            self.model.parallelize(dims)
        compiled = mode.startswith("compiled")
        if compiled and arguments.checkpointing == "selective":
            policy = checkpointing.SelectiveAC if layers == "tpinv" else SelectiveAC
            policy.Config().build().apply(self.model)
        self.model.to_empty(device=DEVICE)
        rank = dist.get_rank() if dims else 0
        with torch.no_grad(), verify.drawn_whole(Ranks(None, rank, tp)) if layers == "stock" else contextlib.nullcontext():
            self.model.init_weights(buffer_device=None)
        if compiled:
            for block in self.model.layers.children():
                block.compile(fullgraph=True)
        kind = InvariantLoss if layers == "tpinv" else CrossEntropyLoss
        self.loss = kind.Config(global_vocab_size=config.vocab_size).build()
        alone = layers == "tpinv" and dims is None  # not the norm of all ranks, some of which wait
        self.clip = functools.partial(clip.clip_grad_norm_, group=ALONE) if alone else utils.clip_grad_norm_
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        text = real_text()
        self.tokens, self.labels = (text[shift : shift + arguments.tokens].view(1, -1).to(DEVICE) for shift in (0, 1))
        self.valid = torch.tensor(self.labels.numel(), device=DEVICE)
        self.extra = {}
        if arguments.attention == "flex":
            length = arguments.tokens
            if layers == "stock":  # one document; what the model itself calls needs torch 2.12
                mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=DEVICE)
            else:
                mask = self.model.get_attention_masks(positions=torch.arange(length, device=DEVICE).view(1, -1))
            self.extra["attention_masks"] = mask
        self.graph = mode.endswith("graph")  # gradients then stay where they are
        self.forward_backward = wrap_with_cuda_graph(self.loss_and_gradients) if self.graph else self.loss_and_gradients

    def loss_and_gradients(self, tokens: Tensor, labels: Tensor, valid: Tensor, extra: dict) -> Tensor:
        with self.context():
            loss, _ = self.loss(self.model(tokens, **extra), labels, valid)
            loss.backward()
        return loss

    def step(self, look=None) -> Tensor:
        loss = self.forward_backward(self.tokens, self.labels, self.valid, self.extra)
        if look is not None:
            look()
        norm = self.clip(list(self.model.parameters()), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.graph)
        return torch.stack([loss.detach().float(), norm.float()])

    def record(self) -> dict[str, Tensor]:
        """Whole tensors: logits, losses and norms, gradients of the last step (a graph's first is eager), parameters after it."""
        with torch.no_grad(), self.context():
            found = {"logits": self.whole(self.model(self.tokens, **self.extra), -1)}

        def gradients():
            for name, parameter in self.model.named_parameters():
                found[f"grad/{name}"] = self.whole(parameter.grad, verify.shard_dim(self.model, name))

        found["loss, norm"] = torch.stack([self.step(gradients if i == RECORDED - 1 else None) for i in range(RECORDED)])
        for name, parameter in self.model.named_parameters():
            found[f"final/{name}"] = self.whole(parameter.detach(), verify.shard_dim(self.model, name))
        return {name.replace("._checkpoint_wrapped_module", ""): tensor for name, tensor in found.items()}

    def whole(self, tensor: Tensor, dim: int | None) -> Tensor:
        if dim is None or self.context is contextlib.nullcontext:
            return tensor.clone()
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts, dim)

    def milliseconds(self, steps: int = 8) -> tuple[float, float]:
        """Median of a step, and the peak of memory in GiB, without what was there before this model."""
        if DEVICE == "cpu":
            return 0.0, 0.0
        self.step(), self.step()
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self.step()
            mark.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
        return statistics.median(times), (torch.cuda.max_memory_allocated() - self.before) / 2**30


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [n for n, t in expected.items() if not torch.equal(found[n].contiguous().view(torch.uint8), t.contiguous().view(torch.uint8))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flavor", default="8B", help="of TorchTitan's llama3 (default 8B)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--attention", choices=("sdpa", "flex"), default="sdpa")
    parser.add_argument("--checkpointing", choices=("selective", "none"), default="selective", help="of activations in compiled blocks")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--layers-of", nargs="+", choices=("tpinv", "stock"), default=["tpinv", "stock"], dest="layers_of")
    parser.add_argument("--seconds", type=float, default=600.0)
    arguments = parser.parse_args()
    started = time.monotonic()
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(device_id=torch.device("cuda", torch.cuda.current_device()) if DEVICE == "cuda" else None)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.autograd.set_multithreading_enabled(False)
    utils.set_spmd_backend("spmd_types")
    dims = Dims(world)
    broken: list[str] = []
    reference: dict[tuple[str, bool], dict[str, Tensor]] = {}  # a compiled block rounds less often than an eager one
    if rank == 0:
        print(f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}, torch {torch.__version__}, {arguments}", flush=True)

    def part(layers: str, tp: int, mode: str) -> None:
        if tp == 1 and rank:
            return
        begun = time.monotonic()
        model = Model(arguments, layers, None if tp == 1 else dims, mode)
        recorded = model.record()
        said = ""
        if rank == 0:
            expected = reference.setdefault((layers, mode.startswith("compiled")), recorded)
            wrong = [] if recorded is expected else differing(recorded, expected)
            broken.extend(wrong if layers == "tpinv" else [])
            said = "reference" if recorded is expected else f"{len(wrong)} of {len(expected)} differ {wrong[:3]}"
            said += f", losses {[round(x, 6) for x in recorded['loss, norm'][:, 0].tolist()]}"
        del recorded
        milliseconds, memory = model.milliseconds()
        if rank == 0:
            print(
                f"{layers} TP={tp}{MODES[mode]}: {milliseconds:.2f} ms, {memory:.2f} GiB; {said}; {time.monotonic() - begun:.0f} s",
                flush=True,
            )

    for mode in arguments.modes:
        for layers in arguments.layers_of:
            for tp in sorted({1, world}):
                late = torch.tensor(time.monotonic() - started > arguments.seconds, device=DEVICE)
                dist.broadcast(late, 0)
                if late:
                    continue
                try:
                    part(layers, tp, mode)
                except RuntimeError as error:  # of dynamo, on every rank alike
                    if layers == "tpinv":
                        raise
                    if rank == 0:
                        print(f"stock TP={tp}{MODES[mode]}: fails in torch: {str(error).strip().splitlines()[0]}", flush=True)
                cudagraph_teardown()  # it keeps the model
                torch._dynamo.reset()  # the blocks of all models are one function, which may be compiled so many times
                gc.collect()
                torch.cuda.empty_cache()
    dist.destroy_process_group()
    if broken:
        sys.exit(f"tpinv differs from one GPU in: {', '.join(broken)}")


if __name__ == "__main__":
    main()
