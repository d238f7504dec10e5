"""How a script learns that the workers, which are other processes, run on tpinv: each leaves a report where the first process says.

A report is a small JSON file named by vLLM's instance id and the rank. It is written when the model has been built and checked, so that
an engine whose plugin was not imported, or was switched off, leaves none.
"""

import json
import os
import tempfile
from pathlib import Path

from tpinv.integrations.vllm import options


def directory() -> Path:
    """Where reports go; made on first use and inherited by the processes that are started later."""
    if options.REPORTS not in os.environ:
        os.environ[options.REPORTS] = tempfile.mkdtemp(prefix="tpinv-vllm-")
    path = Path(os.environ[options.REPORTS])
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(vllm_config, rank: int, report: dict) -> None:
    path = directory() / f"{vllm_config.instance_id}-{rank}.json"
    path.with_suffix(".part").write_text(json.dumps(report))
    path.with_suffix(".part").rename(path)  # whoever reads finds all of it or nothing


def collect(llm) -> list[dict]:
    """The reports of all ranks of an engine. RuntimeError where one is missing."""
    config = _config(llm)
    ranks = config.parallel_config.tensor_parallel_size
    found = {}
    if options.REPORTS in os.environ:
        for rank in range(ranks):
            path = directory() / f"{config.instance_id}-{rank}.json"
            if path.exists():
                found[rank] = json.loads(path.read_text())
    missing = sorted(set(range(ranks)) - found.keys())
    if missing:
        raise RuntimeError(
            f"tpinv is not active in ranks {missing} of {ranks}: {_reason()}; what is not tpinv is stock vLLM, which differs between "
            "tensor-parallel sizes. `tpinv doctor --vllm` says more"
        )
    return [found[rank] for rank in range(ranks)]


def _config(llm):
    for name in ("llm_engine", "engine", "vllm_config"):
        llm = getattr(llm, name, llm)
    if not hasattr(llm, "instance_id"):
        raise ValueError(f"{type(llm).__name__} is no vLLM engine or VllmConfig; pass the LLM")
    return llm


def _reason() -> str:
    if options.requested() is None:
        return f"{options.VARIABLE} is not set; set it, or call tpinv.integrations.vllm.enable(), before the LLM is made"
    if "VLLM_PLUGINS" in os.environ and "tpinv" not in os.environ["VLLM_PLUGINS"].split(","):
        return f"VLLM_PLUGINS={os.environ['VLLM_PLUGINS']!r} switches the plugin off; add tpinv to it"
    return "the plugin was not loaded there; look for 'Failed to load plugin tpinv' in vLLM's log"
