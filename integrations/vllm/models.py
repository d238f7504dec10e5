"""The models that are covered: vLLM's own classes, which check their configuration before they are built and themselves after.

A subclass in vLLM's model registry is the place that every worker passes, with the configuration and the finished model at hand. An
architecture that is not listed here is refused by the first of our layers that it builds (rules.py).
"""

from vllm.model_executor.models.registry import ModelRegistry

from tpinv.integrations.vllm.rules import ARCHITECTURES

MODULE = "tpinv.integrations.vllm.checked_models"


def register() -> None:
    """By name: vLLM imports model classes late, so that a process which forks has not touched CUDA."""
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"{MODULE}:{name}")
