"""Who agrees with whom: one Hugging Face checkpoint and the same tokens in several frameworks at several TP sizes.

Every part computes the logits of the whole vocabulary and the log-probability of each next token (vLLM the latter), with tpinv swapped in
or with the stock layers; the bytes are compared with those of transformers in one process. Rope is computed in the model's dtype everywhere
(``rope_dtype="model"``).
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpinv.functional import vocab_parallel_log_probs
from tpinv.inference import apply_temperature
from tpinv.testing import RankPool, compare
from tpinv.testing.text import real_text
from tpinv.tree import ReductionTree

FRAMEWORKS = ("transformers", "megatron", "torchtitan", "vllm")
KINDS = ("llama", "qwen3")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Task:
    """What every framework computes: tokens of real text, ``batch`` rows of ``length``, through the checkpoint in ``path``."""

    path: str
    layers: str = "tpinv"  # or "stock"
    dtype: str = "bf16"
    leaves: int = 8
    batch: int = 2
    length: int = 48
    node_dtype: str = "float32"
    device: str = "cpu"

    @property
    def tokens(self) -> Tensor:
        return real_text()[: self.batch * self.length].view(self.batch, self.length).long().to(self.device)


def score_rows(
    framework: str, task: Task, rows: Sequence[Sequence[int]], temperature: float, variant: str = "", together: int = 8
) -> list[Tensor] | None:
    """On every rank of a framework: the log-probability of each next token of ``rows``, of logits / temperature, float32 [length - 1] each
    on rank 0. ``task.length`` is the longest row's, or more. Rows are filled up to it on the right, which their bytes do not depend on;
    ``variant`` "SP" is sequence parallelism, for which the ranks must divide it."""
    from importlib import import_module

    import torch.distributed as dist

    found = []
    with import_module(f"tpinv.harness.across.{framework}").opened(task, variant) as (local_logits, group), torch.no_grad():
        for at in range(0, len(rows), together):
            part = rows[at : at + together]
            tokens = torch.zeros(len(part), task.length, dtype=torch.long, device=task.device)
            for i, row in enumerate(part):
                tokens[i, : len(row)] = torch.tensor(row)
            logits = apply_temperature(local_logits(tokens)[:, :-1], temperature)
            scored = vocab_parallel_log_probs(logits, tokens[:, 1:], tree=ReductionTree(task.leaves, task.node_dtype), group=group)
            found += [log_probs[: len(row) - 1].cpu() for row, log_probs in zip(part, scored, strict=True)]
    return found if dist.get_rank() == 0 else None


@dataclass(frozen=True)
class Row:
    """One framework at one size. ``differing``: how many of ``tensors`` (logits, log_probs) have other bytes than the reference's."""

    layers: str
    framework: str
    tp: int
    variant: str
    tensors: int
    differing: int


def make_checkpoint(kind: str, path: str, hidden: int = 128, layers: int = 2) -> None:
    """A random Llama or Qwen 3 with 8 equal leaves everywhere, for TP 1, 2, 4, written as transformers writes it. ``hidden`` of 1024 and
    more: heads of 128 on 8 KV heads and the feed-forward widths of the 8B models, a vocabulary of 32768."""
    import transformers

    torch.manual_seed(0)
    make_config, make_model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    if hidden < 1024:
        sizes = {"vocab_size": 256, "intermediate_size": 344, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    else:
        sizes = {"vocab_size": 32768, "intermediate_size": hidden * 7 // 2 if kind == "llama" else hidden * 3}
        sizes |= {"num_attention_heads": hidden // 128, "num_key_value_heads": 8, "head_dim": 128}
    config = make_config(
        hidden_size=hidden, num_hidden_layers=layers, max_position_embeddings=512, tie_word_embeddings=False, dtype="float32",
        initializer_range=0.1 if hidden < 1024 else 0.02, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **sizes,
    )  # fmt: skip
    make_model(config).save_pretrained(path)


def run_part(framework: str, variant: str, task: Task) -> dict[str, Tensor] | None:
    """On every rank of a part: its tensors on rank 0, whole."""
    from importlib import import_module

    return import_module(f"tpinv.harness.across.{framework}").compute(task, variant)


def parts(frameworks: Sequence[str], sizes: Sequence[int]) -> list[tuple[str, int, str]]:
    """(framework, ranks, variant) of every part. transformers has whole models: one process, and FSDP2 on two."""
    listed = []
    for framework in frameworks:
        if framework == "transformers":
            listed += [("transformers", 1, ""), ("transformers", 2, "FSDP2")]
        elif framework in ("megatron", "torchtitan"):
            listed += [(framework, tp, sp) for tp in sizes for sp in (("",) if tp == 1 else ("", "SP"))]
        else:
            listed += [(framework, tp, "") for tp in sizes]
    return listed


def compare_frameworks(
    frameworks: Sequence[str],
    sizes: Sequence[int],
    task: Task,
    report=lambda row: None,
    *,
    python: str | None = None,
    pool: RankPool | None = None,
    timeout: float = 600.0,
) -> list[Row]:
    """A row for every part; the first, transformers in one process, is what the others are compared with. ``python``: the interpreter of
    an environment that has vLLM, which pins a torch of its own; this one by default. ``pool``: whose workers to use."""
    rows = []
    with contextlib.nullcontext(pool) if pool else RankPool() as pool:
        expected = pool.run(run_part, 1, "transformers", "", task, timeout=timeout, device=task.device)[0]
        for framework, ranks, variant in parts(frameworks, sizes):
            if framework == "vllm":
                from tpinv.harness.across.vllm import serve

                found = serve(task, ranks, python, timeout)
            else:
                found = pool.run(run_part, ranks, framework, variant, task, timeout=timeout, device=task.device)[0]
            shared = found.keys() & expected.keys()
            differing = sum(bool(compare(found[name].reshape(expected[name].shape), expected[name])) for name in shared)
            rows.append(Row(task.layers, framework, 1 if framework == "transformers" else ranks, variant, len(shared), differing))
            report(rows[-1])
    return rows
