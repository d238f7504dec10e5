"""What vLLM reads from the environment while its attention is imported: CUDA graphs that break there, instead of torch.compile.

The plugin sets it as well, but TRL imports vLLM before any plugin is called.
"""

import os
import sys

VARIABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"

if "vllm.model_executor.layers.attention" not in sys.modules:
    os.environ.setdefault(VARIABLE, "1")
