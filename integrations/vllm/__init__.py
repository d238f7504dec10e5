"""vLLM: the same tokens and log-probabilities at every tensor-parallel size, batch and schedule. Made for vLLM 0.26.0 and 0.32.0.

    pip install tpinv[vllm]                                     TPINV_VLLM='{"leaves": 8}' vllm serve MODEL --tensor-parallel-size 2

or, in a script, ``tpinv.integrations.vllm.enable(leaves=8)`` before ``LLM(...)`` and ``assert_active(llm)`` after it.

vLLM finds :func:`register` by its plugin entry point and calls it in every process, before a model is built. Layers are replaced by
vLLM's own registries (layers.py, models.py), attention by its backend registry (attention.py), the functions behind sampling and
log-probabilities in both of its model runners by ours (sampling.py). What is not covered is a ValueError in every worker at start
(guard.py). Without TPINV_VLLM nothing is touched.

vLLM logs and swallows an exception while a plugin is *imported*: then the engine is stock. So this module imports next to nothing, what
can fail fails inside register(), which vLLM lets through, and assert_active and ``tpinv doctor --vllm`` find out the rest.
"""

import json
import os

from tpinv.integrations.vllm import options


def register() -> None:
    """The plugin. Idempotent; does nothing unless TPINV_VLLM is set. ValueError for options or a vLLM that do not fit."""
    if options.requested() is None:
        return
    from tpinv.integrations.vllm import install

    install.install()


def enable(*, leaves: int = 8, node_dtype: str = "float32") -> None:
    """Sets TPINV_VLLM for this process and those it starts. Before an ``LLM`` is made; best before vLLM is imported.

    Args:
        leaves: of the tree, a multiple of every tensor-parallel size to compare.
        node_dtype: "float32", or "bfloat16" for half the bytes on the wire.
    """
    from tpinv.tree import ReductionTree

    ReductionTree(leaves, node_dtype)
    os.environ[options.VARIABLE] = json.dumps({"leaves": leaves, "node_dtype": node_dtype})
    os.environ.setdefault(options.BREAKABLE, "1")  # before vLLM's modules are imported, see install.py


def assert_active(llm) -> list[dict]:
    """RuntimeError unless every worker of ``llm`` has replaced and checked its model; returns their reports, one a rank.

    ``llm``: vllm.LLM, an engine (LLMEngine, AsyncLLM) or a VllmConfig.
    """
    from tpinv.integrations.vllm import reports

    return reports.collect(llm)


__all__ = ["assert_active", "enable", "register"]
