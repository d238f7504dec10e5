"""What Megatron's integration finds of TransformerEngine and Apex is what Megatron finds. Run by test_megatron_te.py and test_megatron_apex.py in
processes that have the stand-ins named in STANDINS, and by the former in its own, which has none."""

import os
import sys

import pytest
from megatron.core.tensor_parallel import layers

from tpinv.integrations.megatron import te

pytestmark = pytest.mark.megatron


def test_what_is_found():
    standins = os.environ.get("STANDINS", "").split()
    assert te.INSTALLED == ("te_standins" in standins) == ("transformer_engine" in sys.modules), te.INSTALLED
    assert bool(te.replacements()) == ("te_standins" in standins)
    assert layers._grad_accum_fusion_available
    assert (layers.fused_weight_gradient_mlp_cuda.__class__.__name__ == "module") == ("apex_standins" in standins)
