"""What the environment asks for: TPINV_VLLM='{"leaves": 8, "node_dtype": "float32"}'. Unset or empty, vLLM stays as it is.

An environment variable, because layers are replaced before a worker knows its configuration, and because all processes of an engine
(front end, core, workers) inherit it. This module imports neither torch nor vLLM.
"""

import json
import os

VARIABLE = "TPINV_VLLM"
BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"  # vLLM's own: CUDA graphs without torch.compile, broken at attention
REPORTS = "TPINV_VLLM_REPORTS"  # a directory in which every worker leaves what it has checked, made by the first process
DEFAULTS = {"leaves": 8, "node_dtype": "float32"}


def requested() -> dict | None:
    """The options, or None where tpinv is not asked for. ValueError for anything but a JSON object of known keys."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{VARIABLE}={text!r} is no JSON ({error}); set it to an object such as '{json.dumps(DEFAULTS)}'") from None
    if not isinstance(given, dict) or given.keys() - DEFAULTS.keys():
        raise ValueError(f"{VARIABLE}={text!r} must be a JSON object with keys of {sorted(DEFAULTS)}, such as '{json.dumps(DEFAULTS)}'")
    return DEFAULTS | given


def tree():
    """The tree that is asked for. ValueError without one."""
    from tpinv.tree import ReductionTree

    options = requested()
    if options is None:
        raise ValueError(f"{VARIABLE} is not set in this process; set it to '{json.dumps(DEFAULTS)}' before vLLM starts")
    return ReductionTree(**options)
