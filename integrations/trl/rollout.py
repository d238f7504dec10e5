"""TRL's vLLM in the trainer's own process, with tpinv's plugin.

In colocate mode every rank of the trainer holds one rank of an engine (vLLM's "external_launcher"): the engines of a tensor-parallel
group run the same schedule without talking about it, so that whatever one of them decides by itself must be the same on all: each
request gets a seed, a function of the trainer's seed, the group, the call and the request's number in it.
"""

import json
import random
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trl.generation import vllm_generation

from tpinv.contract import fingerprint
from tpinv.integrations.vllm import enable, register, reports
from tpinv.tree import ReductionTree


class VLLMGeneration(vllm_generation.VLLMGeneration):
    """``tree`` and ``seed`` are the trainer's; TRL's other arguments are TRL's."""

    def __init__(self, *args, tree: ReductionTree, seed: int, **keywords):
        self.tree, self.seed, self.calls = tree, seed, 0
        super().__init__(*args, **keywords)

    def _init_vllm(self) -> None:
        if self.mode != "colocate":
            raise ValueError(f"vllm_mode={self.mode!r} is not covered: the server's engine cannot be checked from here; use 'colocate'")
        enable(leaves=self.tree.leaves, node_dtype=self.tree.node_dtype)
        register()  # at once: vLLM finds the plugin by its entry point only where tpinv is installed
        super()._init_vllm()
        self._agree(self._problem_of_engine())
        self._generate, self.llm.generate = self.llm.generate, self._generate_with_seeds

    def _problem_of_engine(self) -> str:
        """Why this rank's engine is not tpinv's, with this tree; "" if it is."""
        instance, expected = self.llm.llm_engine.vllm_config.instance_id, fingerprint(self.tree)
        found = [json.loads(path.read_text())["fingerprint"] for path in reports.directory().glob(f"{instance}-*.json")]
        if not found:
            return "vLLM's model is not tpinv's; look for 'tpinv' in its log"
        return "" if found == [expected] else f"the engine's order is {found}, the trainer's {expected}"

    def _agree(self, problem: str) -> None:
        """RuntimeError on every rank if one of them has a problem."""
        problems = [problem]
        if dist.is_initialized() and dist.get_world_size() > 1:
            problems = [None] * dist.get_world_size()
            dist.all_gather_object(problems, problem)
        told = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]
        if told:
            raise RuntimeError("the rollout would differ from the trainer: " + "; ".join(told))

    @property
    def dtype(self) -> torch.dtype:
        """In which the engine computes."""
        return self.llm.llm_engine.model_config.dtype

    def sync_weights(self) -> None:
        """All parameters in one pass. TRL calls the engine for each of them, and vLLM then looks through its whole model; here, too, they are
        gathered when their turn comes, and let go."""
        self.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(self._iter_named_params())
        self.llm.reset_prefix_cache()

    def _iter_fsdp2_params(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What FSDP2 gathers for a forward pass, in the dtype that it computes in: a layer at a time, where TRL gathers every parameter by
        itself. RuntimeError if that leaves one out."""
        missing = {name for name, _ in module.named_parameters()}
        for prefix, unit in module.named_modules():
            if not isinstance(unit, FSDPModule):
                continue
            unit.reshard()  # what a pass without gradients left gathered may be older than the optimizer's step
            unit.unshard()
            for name, parameter in unit.named_parameters(prefix=prefix):
                if name in missing and not isinstance(parameter, DTensor):  # else it is another unit's
                    missing.discard(name)
                    yield self._fix_param_name_to_vllm(name), parameter.detach()
            unit.reshard()
        if missing:
            raise RuntimeError(f"FSDP2 gathered no {sorted(missing)[:3]} ({len(missing)} in all), which the engine would keep from before")

    def _generate_with_seeds(self, prompts, sampling_params, **keywords):
        group = self.accelerator.process_index // self.tensor_parallel_size
        draw = random.Random(f"{self.seed} {group} {self.calls}")
        self.calls += 1
        params = [_with_seed(sampling_params, draw.getrandbits(62)) for _ in prompts]
        return self._generate(prompts, sampling_params=params, **keywords)


def _with_seed(params, seed: int):
    clone = params.clone()
    clone.seed = seed
    return clone
