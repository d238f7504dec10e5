"""The same layers on one rank and on four: the same bytes, forward and backward. Run it: python examples/quickstart.py"""

import torch

from tpinv import ColumnParallelLinear, ReductionTree, RowParallelLinear, silu
from tpinv.testing import assert_bitwise_equal, run_ranks


def mlp():
    torch.manual_seed(0)  # parameters are drawn whole and then sharded
    tree = ReductionTree(leaves=8)  # fixes the order of every sum for 1, 2, 4 and 8 ranks
    up, down = ColumnParallelLinear(64, 256, tree=tree), RowParallelLinear(256, 64, tree=tree)
    x = torch.randn(32, 64, requires_grad=True)
    y = down(silu(up(x)))
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad, "db": down.bias.grad}


if __name__ == "__main__":
    one, four = run_ranks(mlp, 1)[0], run_ranks(mlp, 4)[0]
    for name in one:
        assert_bitwise_equal(four[name], one[name], name)
        print(f"{name}: the same bytes on 4 ranks as on 1")
