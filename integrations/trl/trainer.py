"""TRL's GRPOTrainer with the parts of this package in TRL's places."""

import contextlib
import functools
from collections.abc import Iterator

import trl
from torch import nn
from trl.trainer import grpo_trainer

from tpinv.integrations.transformers import convert
from tpinv.integrations.trl import settings
from tpinv.integrations.trl.lm_head import add_lm_head
from tpinv.integrations.trl.rollout import VLLMGeneration
from tpinv.tree import ReductionTree


class GRPOTrainer(trl.GRPOTrainer):
    """trl.GRPOTrainer, to whose arguments one is added.

    Args:
        model: a Llama or Qwen 3, or its path, for which ``args.model_init_kwargs`` are used as in TRL. Converted in place. The engine
            loads ``model.name_or_path`` in its checkpoint's dtype: the trainer must compute in the same one, by its parameters' dtype or
            by FSDP2's mixed precision.
        tree: of both sides; its leaves must be a multiple of ``vllm_tensor_parallel_size``.

    Raises:
        ValueError: a model, a setting or an argument that is not covered, all of them at once.
        RuntimeError, on every rank: an engine on one of them that is not tpinv's or has another tree.
    """

    def __init__(self, model, reward_funcs=None, args=None, *, tree: ReductionTree, **keywords):
        if not isinstance(tree, ReductionTree):
            raise ValueError(f"tree={tree!r} must be a ReductionTree; pass tree=ReductionTree(8)")
        settings.check_config(args, **{name: keywords.get(name) for name in settings.ARGUMENTS})
        if tree.leaves % args.vllm_tensor_parallel_size:
            raise ValueError(
                f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size} does not divide leaves={tree.leaves}; use 8 or 24"
            )
        self.tree = tree
        if isinstance(model, nn.Module):
            convert(model, tree=tree)
        bonus = args.entropy_coef != 0.0 or args.use_adaptive_entropy
        create = grpo_trainer.create_model_from_path
        replacements = {
            "create_model_from_path": lambda *given, **more: convert(create(*given, **more), tree=tree),
            "add_fused_lm_head": functools.partial(add_lm_head, tree=tree, entropy_has_gradient=bonus),
            "VLLMGeneration": functools.partial(VLLMGeneration, tree=tree, seed=args.seed),
        }
        with _replaced(grpo_trainer, replacements):
            super().__init__(model=model, reward_funcs=reward_funcs, args=args, **keywords)
        self._check_dtype()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        settings.settle_fsdp(getattr(self.accelerator.state, "fsdp_plugin", None))

    def _check_dtype(self) -> None:
        """What the trainer will compute in must be what the engine does."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = plugin.mixed_precision_policy if plugin is not None else None
        dtypes = {parameter.dtype for parameter in self.model.parameters()}
        if policy is not None and policy.param_dtype is not None:
            dtypes = {policy.param_dtype}
        engine = self.vllm_generation.dtype
        if dtypes != {engine}:
            raise ValueError(
                f"the trainer computes in {sorted(map(str, dtypes))}, the engine in {engine}; load the model in the engine's dtype (autocast "
                "does not reach tpinv), or use FSDP2, whose mixed precision casts float32 parameters"
            )


@contextlib.contextmanager
def _replaced(module, attributes: dict) -> Iterator[None]:
    """Attributes of a module for as long as the context lasts: TRL's trainer finds its parts by these names while it is made."""
    stock = {name: getattr(module, name) for name in attributes}  # AttributeError where another TRL has no such part
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in stock.items():
            setattr(module, name, value)
