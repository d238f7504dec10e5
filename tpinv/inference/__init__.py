"""What inference engines share: log-probabilities and sampling whose bytes depend on a request alone, whatever else is in its batch."""

from tpinv.inference.invariant import invariant_mode
from tpinv.inference.log_probs import log_softmax, token_log_probs
from tpinv.inference.sampling import apply_temperature, greedy, gumbel_noise, keep_top, sample, topk
from tpinv.inference.verified import count_equal

__all__ = [
    "apply_temperature",
    "count_equal",
    "greedy",
    "gumbel_noise",
    "invariant_mode",
    "keep_top",
    "log_softmax",
    "sample",
    "token_log_probs",
    "topk",
]
