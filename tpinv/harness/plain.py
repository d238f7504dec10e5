"""Trains a module of the user's (own.py) in a plain loop and records every tensor of the run: any torch module whose ranks are one
tensor-parallel group. ``tpinv verify --model`` runs it on each rank, once with stock layers and once as it is."""

import contextlib
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tpinv
from tpinv.harness import stock, weights
from tpinv.harness.comparison import LOADED, Recording, part
from tpinv.harness.own import Case, OwnRun, call_factory, require_dtype, require_module
from tpinv.testing.record import named_tensors


def train_own(run: OwnRun, first: Recording) -> Recording | None:
    """Trains on this rank. Rank 0 returns the recording, in the order in which things are computed; the others None.

    initial/NAME, step0/output, stepI/loss, stepI/grad/NAME for the first and the last step (before clipping), stepI/grad_norm, final/NAME.
    """
    warnings.simplefilter("ignore")
    case, own_twin = call_factory(run)
    require_module(run, case.model)
    require_dtype(run, case.model)
    model = case.model.to(run.torch_device)
    twin = run.layers == "stock" and not own_twin
    if twin and not stock.has_layers(model):
        raise ValueError(
            f"{run.model} builds no layer of tpinv's whose stock twin verify knows, and takes no argument stock: nothing would have to differ; "
            "let it take stock and build the stock model where that is True"
        )
    if case.batches is None:
        raise ValueError(f"{run.model} returned no batches, which a plain module needs; return (model, batches)")
    batches = [_to(batch, run.torch_device) for batch in case.take(run.steps * run.micro_batches)]
    recording: Recording = {}
    with stock.stock_layers() if twin else contextlib.nullcontext():
        run_loop(run, case, model, batches, recording, first)
    return recording if dist.get_rank() == 0 else None


def run_loop(run: OwnRun, case: Case, model: nn.Module, batches: list, recording: Recording, first: Recording) -> None:
    recording[LOADED] = torch.tensor(weights.agree(run, case, model, first))
    weights.record_parameters(recording, "initial", case, model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3) if case.optimizer is None else case.optimizer(parameters)
    for step in range(run.steps):
        optimizer.zero_grad()
        total = None
        for turn in range(run.micro_batches):
            batch = batches[step * run.micro_batches + turn]
            output = _call(model, batch)
            if step == turn == 0:
                for name, tensor in named_tensors(output, "output"):
                    recording[f"step0/{name}"] = [part(p) for p in weights.gather(tensor)]
            loss = _loss(run, case, output, batch, first)
            (loss / run.micro_batches).backward()
            total = loss.detach().float() if total is None else total + loss.detach().float()
        recording[f"step{step}/loss"] = [part(p) for p in weights.gather(total / run.micro_batches)]
        if step in (0, run.steps - 1):
            weights.record_parameters(recording, f"step{step}/grad", case, model, lambda parameter: parameter.grad)
        norm = _norm_and_clip(run, case, model)
        recording[f"step{step}/grad_norm"] = [part(p) for p in weights.gather(norm)]
        optimizer.step()
    weights.record_parameters(recording, "final", case, model)


def _call(model: nn.Module, batch):
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _loss(run: OwnRun, case: Case, output, batch, first: Recording) -> Tensor:
    if case.loss is not None:
        loss = case.loss(output, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"{run.model}: loss returned {_kind(loss)}; return a scalar tensor")
        return loss.reshape(())
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found.reshape(())
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(
            f"{run.model}: the model returned {_kind(output)}, of which verify makes no loss; return a loss(output, batch) as well"
        )
    if output.numel() == 1:
        return output.reshape(())
    whole = first.get("step0/output")
    if whole and whole[0].shape != tuple(output.shape):
        raise ValueError(
            f"{run.model}: the output is {list(output.shape)} on each of {run.tp} ranks and {list(whole[0].shape)} at TP=1, so its mean square "
            "on a rank is not the loss; return a loss(output, batch) that is the same on every rank"
        )
    return output.float().square().mean()


def _norm_and_clip(run: OwnRun, case: Case, model: nn.Module) -> Tensor:
    """The norm of all gradients, float32 []; then clips."""
    hows = weights.sharding(case, model)
    named = [(parameter, isinstance(hows[name], tuple)) for name, parameter in model.named_parameters() if parameter.grad is not None]
    if run.layers == "stock":
        return stock.norm_and_clip([(parameter.grad, sharded) for parameter, sharded in named], case.clip)
    if case.shards:  # which the modules do not know of
        norm = tpinv.optim.norm_of([parameter.grad for parameter, sharded in named if sharded or dist.get_rank() == 0])
    else:
        norm = tpinv.grad_norm(model)
    if case.clip is not None:
        tpinv.optim.scale_to_norm_([parameter.grad for parameter, _ in named], case.clip, norm)
    return norm


def _to(batch, device: torch.device):
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: _to(value, device) for name, value in batch.items()}
    return type(batch)(_to(value, device) for value in batch) if type(batch) in (tuple, list) else batch


def _kind(value) -> str:
    return f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
