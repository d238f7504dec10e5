"""TorchTitan's RL (torchtitan.experiments.rl) with the limits of its bitwise mode lifted: trainer and generator of different
tensor-parallel sizes, and sequence parallelism. A config function of one's own, reached by ``--module`` and ``--config``:

    def my_run():
        config = rl_grpo_qwen3_0_6b_varlen_batch_invariant()
        return invariant_controller(config, trainer={"tensor_parallel_degree": 1}, generator={"tensor_parallel_degree": 4})

Upstream allows neither because its reductions follow the ranks; the controller refuses sequence parallelism in so many words. The
refusal is lifted only where both sides list the override with the same tree. Batch invariance itself (tokens of other requests, vLLM's
attention) stays upstream's.
"""

import dataclasses
from dataclasses import dataclass

from torchtitan.config.override import derive
from torchtitan.experiments.rl.controller import Controller as StockController

OVERRIDE = "tpinv.integrations.torchtitan.invariant"


class Controller(StockController):
    """The stock controller; its config checks what makes the lifted limits safe."""

    @dataclass(kw_only=True, slots=True)
    class Config(StockController.Config):
        def __post_init__(self):
            trees = {side: _tree(getattr(self, side)) for side in ("trainer", "generator")}
            if None in trees.values() or trees["trainer"] != trees["generator"]:
                raise ValueError(
                    f"trainer and generator must list the override {OVERRIDE} with the same arguments; found {trees}; use invariant_controller"
                )
            trainer = self.trainer
            if not (trainer.debug.batch_invariant and trainer.parallelism.enable_sequence_parallel):
                StockController.Config.__post_init__(self)
                return
            # Every stock check but the one that refuses both at once: first without the one, then without the other.
            debug, parallelism = trainer.debug, trainer.parallelism
            trainer.debug = dataclasses.replace(debug, batch_invariant=False)
            StockController.Config.__post_init__(self)
            trainer.debug = debug
            trainer.parallelism = dataclasses.replace(parallelism, enable_sequence_parallel=False)
            StockController.Config.__post_init__(self)
            trainer.parallelism = parallelism


def invariant_controller(
    config: StockController.Config,
    *,
    trainer: dict | None = None,
    generator: dict | None = None,
    leaves: int = 8,
    node_dtype: str = "float32",
    forward_only: bool = True,
) -> Controller.Config:
    """``config`` with the override on both sides. ``trainer`` and ``generator`` are changes to their parallelism. ValueError as in
    __post_init__. What the two compare is log-probabilities, so by default the trainer's data parallelism is not limited to 2."""
    arguments = {"leaves": leaves, "node_dtype": node_dtype, "forward_only": forward_only}
    for side, changes in ((config.trainer, trainer), (config.generator, generator)):
        if _tree(side) is None:
            side.override = dataclasses.replace(side.override, imports=[*side.override.imports, (OVERRIDE, arguments)])
        side.parallelism = dataclasses.replace(side.parallelism, **(changes or {}))
    return derive(config, Controller.Config)


def _tree(side) -> dict | None:
    """The override's arguments, or None where it is not listed."""
    for entry in side.override.imports:
        name, arguments = (entry, {}) if isinstance(entry, str) else entry
        if name == OVERRIDE:
            return {"leaves": 8, "node_dtype": "float32", "forward_only": False} | arguments
    return None
