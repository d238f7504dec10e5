"""Lets TorchTitan 0.3.0 run without an accelerator (on gloo), and be imported below torch 2.14, which it is made for. Import it before
anything else of torchtitan, which reads the device once.

``torch.cpu`` lacks some functions of ``torch.cuda`` that the trainer's metrics call. torch below 2.14 lacks a function that the trainer
calls after its first step, below 2.12 a class that is only passed on to FSDP. Where nothing is lacking nothing is changed.
"""

import os
import types

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torchtitan.tools import utils


def _cpu_module() -> types.SimpleNamespace:
    properties = types.SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    lacking = {
        "get_device_name": lambda device=None: "cpu",
        "get_device_properties": lambda device=None: properties,
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
    }
    return types.SimpleNamespace(**{**vars(torch.cpu), **lacking})


if not torch.cuda.is_available():
    utils.device_type, utils.device_module = "cpu", _cpu_module()
if not hasattr(dist, "set_timeout"):
    dist.set_timeout = lambda timeout, group=None: dist.distributed_c10d._set_pg_timeout(timeout, group)
if not hasattr(dist.fsdp, "DataParallelMeshDims"):
    dist.fsdp.DataParallelMeshDims = types.SimpleNamespace
