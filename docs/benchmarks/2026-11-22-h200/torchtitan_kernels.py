"""GPU time by kernel of an eager TorchTitan step at TP = 1, stock and tpinv.

torchrun --nproc_per_node 1 docs/benchmarks/2026-11-22-h200/torchtitan_kernels.py
"""

import argparse
import collections
import gc

from tpinv.harness.torchtitan import bench  # isort: skip  # before torchtitan
import torch
import torch.distributed as dist
from torchtitan.distributed import utils

torch.cuda.set_device(0)
dist.init_process_group(device_id=torch.device("cuda", 0))
torch.autograd.set_multithreading_enabled(False)
utils.set_spmd_backend("spmd_types")
for layers in ("stock", "tpinv"):
    model = bench.Model(argparse.Namespace(flavor="8B", layers=4, tokens=4096, attention="sdpa"), layers, None, "eager")
    milliseconds, _ = model.milliseconds()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            model.step()
        torch.cuda.synchronize()
    times, calls = collections.Counter(), collections.Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Optimizer", "ProfilerStep")):
            times[event.name] += event.device_time_total
            calls[event.name] += 1
    print(f"#### {layers}: {milliseconds:.2f} ms, sum of kernels {sum(times.values()) / 3e3:.2f}", flush=True)
    for name, microseconds in times.most_common(34):
        print(f"{microseconds / 3e3:8.3f} ms {calls[name] / 3:6.1f}x {name[:150]}")
    del model, profile
    gc.collect()
    torch.cuda.empty_cache()
