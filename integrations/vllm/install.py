"""Puts tpinv's classes into vLLM's registries, once a process."""

import os
import warnings

from tpinv.integrations.vllm import options, reports

TESTED = ("0.26.0", "0.32.0")


def install() -> None:
    """What :func:`tpinv.integrations.vllm.register` does when it is asked for. Idempotent: the registry is the memory."""
    tree = options.tree()
    reports.directory()
    # Read when vLLM imports its attention module, hence before anything else. With it the model runs eagerly and is recorded into CUDA
    # graphs that break at attention; torch.compile, which would round differently between our operators, is off.
    os.environ.setdefault(options.BREAKABLE, "1")
    os.environ.setdefault("TPINV_TUNE", "largest")  # a prefill of another length does not wait for kernels to be timed
    import vllm
    from vllm.model_executor.custom_op import op_registry_oot

    from tpinv.integrations.vllm import attention, layers, models, sampling, speculation

    if op_registry_oot.get("RowParallelLinear") is layers.RowParallelLinear:
        return
    version = vllm.__version__.split("+")[0]
    if version not in TESTED:
        warnings.warn(
            f"vLLM {version} is not one of {', '.join(TESTED)}, which tpinv was tested with; run tpinv verify --framework vllm",
            stacklevel=2,
        )
    if taken := sorted(set(layers.REPLACED) & op_registry_oot.keys()):
        raise ValueError(f"another plugin has replaced {taken} already; set VLLM_PLUGINS=tpinv to load this one alone")
    layers.register()
    models.register()
    attention.register()
    sampling.install(tree)
    speculation.install()
