"""sliding_window, softcap and sinks of the attention functions: what callers pass, what operators take, and what kernels are given.

A caller names an option or leaves it at None; an operator's numbers have 0 for none, since a graph holds numbers; kernels and the reference
get :class:`tpinv.reference.attention.Options`, which says what each does.
"""

import operator

import torch
from torch import Tensor

from tpinv import reference
from tpinv.reference.attention import LOG2E, Options

MOST_WINDOW = 1 << 30  # keys: no sequence is longer, and positions are counted in 32 bits


def option_numbers(sliding_window: int | None, softcap: float | None) -> tuple[int, float]:
    """What operators take, where 0 is none. ValueError for what is no option: 0, too, is a mistake of who names it."""
    if sliding_window is not None:
        if isinstance(sliding_window, bool | Tensor) or not hasattr(sliding_window, "__index__") or sliding_window < 1:
            raise ValueError(
                f"sliding_window={sliding_window!r} must be a whole number of keys, the query's own among them, hence at least 1; pass None "
                "for all keys"
            )
    if softcap is not None:
        if isinstance(softcap, bool | Tensor | str) or not hasattr(softcap, "__float__") or not softcap > 0:
            raise ValueError(f"softcap={softcap!r} must be a number above 0; pass None for scores without a cap")
    return operator.index(sliding_window or 0), float(softcap or 0.0)


def options_of(sinks: Tensor | None, sliding_window: int, softcap: float) -> Options:
    """Inverse of :func:`option_numbers`."""
    sinks = None if sinks is None else sinks.contiguous()
    return Options(min(sliding_window, MOST_WINDOW) or None, softcap or None, sinks)


def check_options(query: Tensor, sinks: Tensor | None, scale: float, causal: bool, sliding_window: int, softcap: float) -> None:
    """The errors of sliding_window, softcap and sinks. query [..., h, d]"""
    if sliding_window < 0:
        raise ValueError(f"sliding_window={sliding_window} must be a number of keys, or 0 for all")
    if sliding_window and not causal:
        raise ValueError(f"sliding_window={sliding_window} with causal=False is not covered: a window ends at the query's own key")
    if softcap and not all(2.0**-126 <= x < 2.0**127 for x in (softcap, scale / softcap, softcap * LOG2E)):
        raise ValueError(f"softcap={softcap} with scale={scale} must be above 0 and finite in float32, and so must scale / softcap")
    if sinks is not None:
        heads = query.shape[-2]
        if sinks.shape != (heads,) or sinks.dtype not in reference.SUPPORTED_DTYPES or sinks.device != query.device:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in reference.SUPPORTED_DTYPES)
            raise ValueError(
                f"sinks {tuple(sinks.shape)} {sinks.dtype} on {sinks.device} must be one logit for each of the query's {heads} heads, "
                f"{supported}, on {query.device}"
            )


def probed(options: tuple[bool, bool, bool], heads: int, device: torch.device) -> Options:
    """What a probe computes with, of the last ``heads`` of 8."""
    window, softcap, sinks = options
    logits = torch.arange(8, device=device)[8 - heads :] - 4.0
    return Options(77 if window else None, 5.0 if softcap else None, logits if sinks else None)
