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
        return real_text()[: self.batch * self.length].view(self.batch, self.length).long()


def score_rows(framework: str, task: Task, rows: Sequence[Sequence[int]], temperature: float, together: int = 8) -> list[Tensor] | None:
    """On every rank of a framework: the log-probability of each next token of ``rows``, of logits / temperature, float32 [length - 1] each
    on rank 0. ``task.length`` is the longest row's. Rows are filled up on the right, which their bytes do not depend on."""
    from importlib import import_module

    import torch.distributed as dist

    found = []
    with import_module(f"tpinv.harness.across.{framework}").opened(task, "") as (local_logits, group), torch.no_grad():
        for at in range(0, len(rows), together):
            part = rows[at : at + together]
            tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in part], batch_first=True).to(task.device)
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


def make_checkpoint(kind: str, path: str) -> None:
    """A small random Llama or Qwen 3 with 8 equal leaves everywhere, for TP 1, 2, 4, written as transformers writes it."""
    import transformers

    torch.manual_seed(0)
    make_config, make_model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    config = make_config(
        vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.1, dtype="float32",
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
        expected = pool.run(run_part, 1, "transformers", "", task, timeout=timeout)[0]
        for framework, ranks, variant in parts(frameworks, sizes):
            if framework == "vllm":
                from tpinv.harness.across.vllm import serve

                found = serve(task, ranks, python, timeout)
            else:
                found = pool.run(run_part, ranks, framework, variant, task, timeout=timeout)[0]
            shared = found.keys() & expected.keys()
            differing = sum(bool(compare(found[name].reshape(expected[name].shape), expected[name])) for name in shared)
            rows.append(Row(task.layers, framework, 1 if framework == "transformers" else ranks, variant, len(shared), differing))
            report(rows[-1])
    return rows
