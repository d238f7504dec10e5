"""What cannot be invariant, or is not shown to be, is refused before a model trains on it: rule, value, fix.

By allowlist (settings.py): a setting that nobody has looked at must stand at its default, so that a new option of a new version is an
error here until somebody has. The same goes for modules, parameters and hooks (modules.py).
"""

import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Collection

import megatron.core
import torch
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from tpinv import functional
from tpinv.integrations.megatron import settings
from tpinv.tree import ReductionTree

logger = logging.getLogger("tpinv")

TESTED = ((0, 16, 1), (0, 19, 2))  # both ends are in make test

# On a CPU the first two are replaced: torch's last elements of a row may be computed by another function than the others.
ACTIVATIONS = {torch.nn.functional.silu: functional.silu, torch.nn.functional.gelu: functional.gelu}
EXACT_ACTIVATIONS = (torch.nn.functional.relu, squared_relu)

NO_DEFAULT = object()


def _defaults(base: type, config) -> dict[str, tuple]:
    """Name -> the values that count as default: what the class declares, and what its __post_init__ makes of that in a small model."""
    small = {"num_layers": 1, "hidden_size": 1, "num_attention_heads": 1} if base is TransformerConfig else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = base(**small)
    declared = {
        field.name: field for field in (*dataclasses.fields(config), *dataclasses.fields(base))
    }  # a subclass's own defaults do not count
    values = {}
    for name in {**declared, **vars(config)}:
        field, found = declared.get(name), []
        if field is not None and field.default is not dataclasses.MISSING:
            found.append(field.default)
        if field is not None and field.default_factory is not dataclasses.MISSING:
            found.append(field.default_factory())
        if hasattr(made, name):
            found.append(getattr(made, name))
        values[name] = tuple(found)
    return values


def setting_problems(config, base: type, accept: Collection = ()) -> list[str]:
    """Every setting of ``config``, an instance of Megatron's dataclass ``base``, that is neither allowed by settings.py nor in ``accept``."""
    table, problems = settings.TABLES[base.__name__], []
    for name, defaults in _defaults(base, config).items():
        known = table.get(name)
        if not hasattr(config, name) or (known is not None and known.values is None):
            continue
        value = getattr(config, name)
        allowed = (*(known.values if known else ()), *(defaults if known is None or known.default else ()))
        if any(_same(value, fine) for fine in allowed) or (known is not None and not value and not any(defaults)):
            continue
        if known is None and name in accept:
            continue
        default = repr(defaults[0]) if defaults else "none"
        fix = f"set {name}={' or '.join(repr(fine) for fine in known.values) if known and known.values else default}"
        if known is None:
            fix += f", or pass accept=[{name!r}] if you have looked at what it does to the sums over ranks"
        problems.append(
            f"{name}={value!r}: {known.why if known else f'nobody has looked at this setting (its default is {default})'}; {fix}"
        )
    return problems


def _same(value, other) -> bool:
    return value is other or (value == other) is True


def _rules(config, tp: int):
    """(holds, rule and value, fix): what settings.py cannot say as a list of values."""

    def get(name, default=None):
        return getattr(config, name, default)

    groups = get("num_query_groups") or get("num_attention_heads")
    gelu_fused = get("bias_activation_fusion") and get("add_bias_linear") and not get("gated_linear_unit")
    yield (
        groups >= tp and groups % tp == 0,
        f"num_query_groups={groups} is not a multiple of the tensor-parallel size {tp}: dK and dV of a group would be split over ranks",
        f"use a tensor-parallel size that divides {groups}",
    )
    yield (
        not gelu_fused,
        "bias_activation_fusion with GELU: the fused kernel adds a bias that tpinv has added already",
        "set bias_activation_fusion=False",
    )
    yield (
        get("cross_entropy_fusion_impl") != "linear" or not get("cross_entropy_loss_fusion"),
        "cross_entropy_fusion_impl='linear' bypasses the output layer",
        "set cross_entropy_loss_fusion=False",
    )
    activation = get("activation_func", EXACT_ACTIVATIONS[0])
    yield (
        activation in {*ACTIVATIONS, *ACTIVATIONS.values(), *EXACT_ACTIVATIONS},
        f"activation_func={activation} may depend on a shard's width on a CPU, and is not tested on a GPU",
        "use silu, gelu, relu or squared_relu",
    )
    window = get("window_size")
    yield (
        window is None or is_window(window),
        f"window_size={window!r} is not covered: tpinv's attention sees keys before a query and its own",
        "use (keys before its own, 0), such as (127, 0), or None",
    )
    finalize = get("finalize_model_grads_func")
    while isinstance(finalize, functools.partial):
        finalize = finalize.func
    yield (
        finalize is None or getattr(finalize, "__module__", "").startswith("megatron.core."),
        f"finalize_model_grads_func={finalize}: gradients may be added once more, in an order of its own",
        "use megatron.core.distributed.finalize_model_grads",
    )


def is_window(window) -> bool:
    """(keys before a query's own, 0), as two whole numbers."""
    try:
        left, right = window
    except (TypeError, ValueError):
        return False
    return type(left) is type(right) is int and left >= 0 == right


def check_config(config, tree: ReductionTree, tp: int, accept: Collection = ()) -> None:
    """ValueError naming every setting of a TransformerConfig that keeps a model from being invariant, or that nobody has looked at."""
    tree.owned(0, tp)
    warn_of_version(megatron.core.__version__)
    broken = setting_problems(config, TransformerConfig, accept)
    broken += [f"{rule}; {fix}" for holds, rule, fix in _rules(config, tp) if not holds]
    _raise("this model cannot be made invariant to the tensor-parallel size", broken)


def check_data_parallel(config, accept: Collection = ()) -> None:
    """The same for the DistributedDataParallelConfig that a chunk is wrapped with."""
    _raise("this DistributedDataParallel is not covered", setting_problems(config, DistributedDataParallelConfig, accept))


def check_optimizer_config(config, accept: Collection = ()) -> None:
    """The same for an OptimizerConfig."""
    _raise("this optimizer is not covered", setting_problems(config, OptimizerConfig, accept))


def _raise(what: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{what}:\n" + "\n".join(f"  - {problem}" for problem in problems))


@functools.cache  # once for each version in a process
def warn_of_version(version: str) -> None:
    """A warning, and a line in the log, when Megatron-Core is older or newer than what tpinv is tested with."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    low, high = TESTED
    if not low <= numbers <= high:
        text = (
            f"megatron-core {version} is outside {'.'.join(map(str, low))} to {'.'.join(map(str, high))}, which tpinv is tested with: its settings "
            "are checked against the list of those versions, but what its layers do may have changed; run tpinv verify"
        )
        logger.warning(text)
        warnings.warn(text, stacklevel=3)


def padded_vocab_size(vocab_size: int, tree: ReductionTree, divisible_by: int = 128) -> int:
    """The vocabulary size to build a model with: the smallest multiple of ``divisible_by`` and of the tree's leaves.

    Megatron's own padding is to a multiple of ``make_vocab_size_divisible_by * TP``. It changes with TP, and with it the number of
    dummy logits in every softmax.
    """
    multiple = math.lcm(divisible_by, tree.leaves)
    return -(-vocab_size // multiple) * multiple


def check_vocabulary(vocab_size: int, tree: ReductionTree, tokenizer_vocab_size: int | None, divisible_by: int = 128) -> None:
    """ValueError unless the model's vocabulary has equal leaves and, when the tokenizer's size is given, does not depend on TP."""
    if vocab_size % tree.leaves:
        raise ValueError(
            f"vocab_size={vocab_size} is no multiple of leaves={tree.leaves}, so it would have to be padded, and differently at every "
            f"tensor-parallel size; build the model with {padded_vocab_size(vocab_size, tree, divisible_by)} (padded_vocab_size) at every one"
        )
    if tokenizer_vocab_size is None:
        return
    fixed = padded_vocab_size(tokenizer_vocab_size, tree, divisible_by)
    if vocab_size not in (tokenizer_vocab_size, fixed):
        raise ValueError(
            f"vocab_size={vocab_size} is padded from {tokenizer_vocab_size} by a rule that may depend on the tensor-parallel size; build the "
            f"model with {fixed} at every one: padded_vocab_size({tokenizer_vocab_size}, tree, {divisible_by}), which depends on the tree alone"
        )
