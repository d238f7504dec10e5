"""How anyone can check tpinv, or a stranger's code: compare bytes, recover the order of additions, run ranks, record a run.

>>> from tpinv.testing import assert_bitwise_equal, order_probe, record, run_ranks
"""

from tpinv.testing.bits import Difference, assert_bitwise_equal, compare, ulp_distance
from tpinv.testing.probe import order_probe, tree_shape
from tpinv.testing.ranks import RankError, RankPool, run_ranks
from tpinv.testing.record import record

__all__ = [
    "Difference",
    "RankError",
    "RankPool",
    "assert_bitwise_equal",
    "compare",
    "order_probe",
    "record",
    "run_ranks",
    "tree_shape",
    "ulp_distance",
]
