"""TRL: GRPO whose trainer and rollout compute the same log-probabilities. Made for TRL 1.16, vLLM in colocate mode, Llama and Qwen 3.

    from tpinv.integrations.trl import GRPOTrainer          # before anything that imports vLLM

    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=GRPOConfig(use_vllm=True, vllm_tensor_parallel_size=2, ...),
                          train_dataset=prompts, tree=ReductionTree(8))

The trainer's model is whole (one process, DistributedDataParallel or FSDP2), the rollout's runs at any tensor-parallel size:
``sampling/sampling_logp_difference/max`` is 0 and every importance ratio exactly 1. What TRL does is TRL's; replaced are

    the model                transformers' layers by tpinv's (tpinv.integrations.transformers), a reference model's too
    the engine               vLLM with tpinv's plugin, checked when it has been built (rollout.py)
    the fused lm_head        by lm_head.py: one function for log-probabilities in the trainer and in the engine; positions as in the engine
    seeds                    every request has one of its own, so that the ranks of an engine draw the same tokens
    FSDP2's output_dtype     accelerate sets it to bfloat16, to which it would round log-probabilities

and every setting that is not known to keep the promise is refused (settings.py).
"""

from tpinv.integrations.trl import environment  # noqa: F401  what vLLM reads while it is imported, which importing TRL does
from tpinv.integrations.trl.trainer import GRPOTrainer

__all__ = ["GRPOTrainer"]
