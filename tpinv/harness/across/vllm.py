"""vLLM: the tokens as prompts, whose log-probabilities it returns. An engine runs in a process, maybe an environment, of its own."""

import os
import sys
import tempfile
from dataclasses import asdict

import torch
from torch import Tensor

from tpinv.harness.across import Task
from tpinv.harness.vllm.schedule import Plan, Request
from tpinv.harness.vllm.verify import run_job


def serve(task: Task, tp: int, python: str | None, timeout: float) -> dict[str, Tensor]:
    """log_probs [b, s - 1] of each next token, float32, as the engine returned them."""
    rows = task.tokens.tolist()
    requests = [
        Request(name=f"row {i}", prompt=tuple(row), tokens=1, seed=None, temperature=0.0, top_k=0, top_p=1.0, prompt_log_probs=True)
        for i, row in enumerate(rows)
    ]
    job = {
        "layers": task.layers, "leaves": task.leaves, "device": task.device, "model": task.path,
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[task.dtype], "eager": True, "block": 32, "memory": 0.2, "longest": task.length + 8,
        "requests": [asdict(request) for request in requests], "tp": tp, "python": python or sys.executable,
        "plan": Plan("together", (tuple((r.name, 0) for r in requests),), 4096, len(rows), prefix_cache=False, blocks=0).as_dict(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tpinv-vllm-") as directory:
        answers = run_job(job, os.path.join(directory, "job"), timeout)["answers"]
    values = [[number_of(text) for text in answers[f"row {i}"]["prompt_log_probs"]] for i in range(len(rows))]
    return {"log_probs": torch.tensor(values, dtype=torch.float32)}


def number_of(text: str) -> float:
    """The float32 whose bytes ``text`` gives in hexadecimal, as serve_plan writes them."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.float32).item()
