"""core_attention refuses what it cannot compute. What it computes: test_attention.py on a CPU, test_gpu_step.py on a GPU."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tpinv.ops import core_attention, packed_attention, swiglu

q, kv = torch.zeros(5, 2, 6, 8), torch.zeros(5, 2, 3, 8)


@pytest.mark.parametrize(
    "query, key, value, message",
    [
        (q[0], kv, kv, "must be"),
        (q, kv, kv[:4], "must be"),
        (q, kv[:, :1], kv[:, :1], "must be"),
        (q[:, :, :4], kv, kv, "g dividing h"),
        (q, kv[:0], kv[:0], "at least 1"),
        (q[..., :0], kv[..., :0], kv[..., :0], "at least 1"),
        (q, kv[:4], kv[:4], "5 queries over 4 keys"),
        (q.half(), kv, kv, "dtypes must agree"),
    ],
)
def test_refusals(query, key, value, message):
    with pytest.raises(ValueError, match=message):
        core_attention(query, key, value)
    with pytest.raises(ValueError, match=message):  # the operator: the same
        torch.ops.tpinv.core_attention(query, key, value, 1.0, True)


cu = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    "query, key, cu_q, padded, message",
    [
        (q, kv[:, 0], cu, cu, r"must be \[t, h, d\]"),
        (q[:, 0, :4], kv[:, 0], cu, cu, "g dividing h"),
        (q[:, 0, :, :4], kv[:, 0], cu, cu, "must be"),
        (q[:, 0], kv[:, 0], cu.long(), cu, r"pass torch.int32 \[n \+ 1\]"),
        (q[:, 0], kv[:, 0], cu[:2], cu, r"int32 \(2,\) on cpu, torch.int32 \(3,\) on cpu"),
        (q[:, 0], kv[:, 0], cu, cu[None], r"\(1, 3\) on cpu"),
        (q[:, 0], kv[:, 0], cu[:0], cu, "pass torch.int32"),
        (q[:, 0], kv[:, 0].half(), cu, cu, "dtypes must agree"),
    ],
)
def test_packs_that_are_refused(query, key, cu_q, padded, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(query, key, key, cu_seqlens_q=cu_q, cu_seqlens_kv=cu, cu_seqlens_kv_padded=padded)
    with pytest.raises(ValueError, match=message):  # the operator: the same
        torch.ops.tpinv.packed_attention(query, key, key, cu_q, cu, cu_q, padded, 5, 5, 1.0, True)


@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-50, float("inf"), float("nan")])
def test_scales_under_which_the_largest_score_is_not_the_largest_are_refused(scale):
    with pytest.raises(ValueError, match=f"scale={scale} must be above 0 and finite"):
        core_attention(q, kv, kv, scale=scale)


def test_two_devices_are_refused():
    with FakeTensorMode(), pytest.raises(ValueError, match="cuda:0.*cpu.*cpu.*move them to one"):
        core_attention(torch.empty(q.shape, device="cuda"), torch.empty(kv.shape), torch.empty(kv.shape))


def test_swiglu_is_its_two_steps_and_wants_both():
    from tpinv.ops import silu

    x = torch.randn(3, 5, 14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(swiglu(x), silu(x[..., :7]) * x[..., 7:])
    with pytest.raises(ValueError, match="gate and up side by side"):
        swiglu(x[..., :13])
