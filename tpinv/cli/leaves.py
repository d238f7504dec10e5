"""``tpinv leaves``: which numbers of leaves serve the tensor-parallel sizes that shall agree, from a model's dimensions.

    tpinv leaves --model config.json --tp 1,2,3
    tpinv leaves --hidden 4096 --ffn 14336 --heads 32 --kv-heads 8 --vocab 128256 --tp 1,2,4,8

L must be a multiple of every size, and cut every dimension that a sum crosses ranks on (or that ranks share) into equal leaves: the
feed-forward width, the width of all heads, that of all key-value heads, and the vocabulary, which may be padded. Each size must also
divide the heads and the key-value heads themselves, as in Megatron-Core and TorchTitan. The smallest such L is the fastest at TP = 1.

Exit status 0 if some L serves, 2 if none does.
"""

import argparse
import json
import math
import os
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

# Hugging Face's names of what is asked for (Llama, Qwen 2 and 3, Mistral; GPT-2's older ones).
KEYS = {
    "hidden": ("hidden_size", "n_embd"),
    "ffn": ("intermediate_size", "n_inner"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
LISTED = 8  # numbers of leaves to list


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="CONFIG.json", help="a Hugging Face config.json, or a directory that holds one")
    parser.add_argument("--tp", default="1,2,4,8", help="the tensor-parallel sizes that shall agree (default 1,2,4,8)")
    parser.add_argument("--hidden", type=int, help="hidden size")
    parser.add_argument("--ffn", type=int, help="feed-forward width (of gate, and of up)")
    parser.add_argument("--heads", type=int, help="attention heads")
    parser.add_argument("--kv-heads", type=int, help="key-value heads (default: as many as heads)")
    parser.add_argument("--head-dim", type=int, help="width of a head (default hidden / heads)")
    parser.add_argument("--vocab", type=int, help="vocabulary")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    sizes = parse_sizes(arguments.tp)
    model = _model(arguments)
    console = Console(highlight=False)
    shown = ", ".join(f"{name} {value}" for name, value in model.shown)
    console.print(f"{shown}; TP = {', '.join(map(str, sizes))}", soft_wrap=True)
    base = math.lcm(*sizes)
    candidates = [base * factor for factor in range(1, LISTED + 1)]
    table = Table("leaves", "serves", "forbidden by", title=f"multiples of {base}", title_justify="left")
    for leaves in candidates:
        against = model.forbid(leaves)
        table.add_row(str(leaves), "[red]no[/]" if against else "[green]yes[/]", ", ".join(against))
    heads = {size: against for size in sizes if (against := model.forbid_size(size))}
    for size, against in heads.items():
        console.print(f"TP={size} is forbidden by {', '.join(against)}: every rank has the same number of them")
    console.print(table)
    fitting = [leaves for leaves in candidates if not model.forbid(leaves)]
    if not heads and fitting:
        best = fitting[0]
        also = [size for size in range(2, best + 1) if best % size == 0 and size not in sizes and not model.forbid_size(size)]
        more = f"; it serves TP = {', '.join(map(str, also))} as well" if also else ""
        console.print(f"[green]use leaves={best}[/], the smallest and fastest{more}", soft_wrap=True)
        return 0
    pads = model.pads(base, sizes)
    raise ValueError(
        f"no number of leaves serves this model at TP = {', '.join(map(str, sizes))} as it is; pad {'; '.join(pads)}, then use leaves={base}"
    )


def parse_sizes(text: str) -> list[int]:
    """[1, 2, 3] of "1,2,3". ValueError for what is no list of different positive integers."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        raise ValueError(f"--tp {text!r} must be integers separated by commas, such as 1,2,4,8") from None
    if min(sizes) < 1:
        raise ValueError(f"--tp {text!r} holds {min(sizes)}; a size is at least 1")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"--tp {text!r} names a size twice; name each once")
    return sorted(sizes)


@dataclass(frozen=True)
class Model:
    """The dimensions that tensor parallelism cuts."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    @property
    def shown(self) -> list[tuple[str, int]]:
        names = ("hidden", "ffn", "heads", "kv-heads", "head-dim", "vocab")
        return [(name, getattr(self, name.replace("-", "_"))) for name in names]

    @property
    def widths(self) -> dict[str, int]:
        """What must have equal leaves, by the name that a reader knows it by."""
        widths = {"ffn": self.ffn, "vocabulary": self.vocab}
        widths |= {f"{self.heads} heads x {self.head_dim}": self.heads * self.head_dim}
        return widths | {f"{self.kv_heads} kv-heads x {self.head_dim}": self.kv_heads * self.head_dim}

    def forbid(self, leaves: int) -> list[str]:
        return [f"{name} = {width}" for name, width in self.widths.items() if width % leaves]

    def forbid_size(self, size: int) -> list[str]:
        return [f"{value} {name}" for name, value in (("heads", self.heads), ("kv-heads", self.kv_heads)) if value % size]

    def pads(self, base: int, sizes: list[int]) -> list[str]:
        """What to pad, and to what, for ``base`` leaves at ``sizes``."""
        found = []
        heads = self.heads * self.head_dim % base or self.kv_heads * self.head_dim % base
        if heads or any(self.forbid_size(size) for size in sizes):
            groups = _up(self.kv_heads, base)  # which keep their number of heads
            found.append(
                f"kv-heads {self.kv_heads} to {groups} and heads {self.heads} to {self.heads // self.kv_heads * groups} (with zero weights)"
            )
        if self.ffn is not None and self.ffn % base:
            found.append(f"ffn {self.ffn} to {_up(self.ffn, 8 * base)}")
        if self.vocab is not None and self.vocab % base:
            found.append(f"vocab {self.vocab} to {_up(self.vocab, base)}")
        return found


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _model(arguments: argparse.Namespace) -> Model:
    """The dimensions of the file, with those that were named in their place. ValueError naming what is missing or wrong."""
    found, where = _read(arguments.model) if arguments.model else ({}, "")
    named = {name: getattr(arguments, name) for name in KEYS}
    found |= {name: value for name, value in named.items() if value is not None}
    if not found:
        raise ValueError("name a config.json by --model, or dimensions by --hidden, --ffn, --heads, --kv-heads and --vocab")
    missing = [f"--{name.replace('_', '-')}" for name in ("hidden", "heads", "ffn", "vocab") if name not in found]
    if missing:
        raise ValueError(
            f"{where or 'what was named'} has no {', '.join(missing)}; name {'it' if len(missing) == 1 else 'them'} on the command line"
        )
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}{name.replace('_', '-')} is {value!r}; it must be an int of at least 1")
    found.setdefault("kv_heads", found["heads"])
    if found["heads"] % found["kv_heads"]:
        raise ValueError(f"{found['heads']} heads are no multiple of {found['kv_heads']} kv-heads")
    if "head_dim" not in found:
        if found["hidden"] % found["heads"]:
            raise ValueError(f"hidden {found['hidden']} is no multiple of {found['heads']} heads; name --head-dim")
        found["head_dim"] = found["hidden"] // found["heads"]
    return Model(**found)


def _read(path: str) -> tuple[dict, str]:
    """What a Hugging Face config says under our names. ValueError for a file that is none, or describes a mixture of experts."""
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except OSError as error:
        raise ValueError(f"--model {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"--model {path} is no JSON: {error}") from error
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):  # a model of several kinds of input
        config = config["text_config"]
    if not isinstance(config, dict):
        raise ValueError(
            f"--model {path} holds a {type(config).__name__}; a Hugging Face config is an object with hidden_size and the like"
        )
    if experts := next((name for name in EXPERTS if (config.get(name) or 0) != 0), None):
        raise ValueError(f"--model {path} is a mixture of experts ({experts}={config[experts]}), which tpinv does not cover")
    found = {name: config[key] for name, keys in KEYS.items() for key in reversed(keys) if config.get(key) is not None}
    if "ffn" not in found and "n_embd" in config and isinstance(config["n_embd"], int):
        found["ffn"] = 4 * config["n_embd"]  # GPT-2's default
    return found, f"{path}: "
