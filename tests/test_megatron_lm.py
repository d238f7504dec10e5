"""Megatron-LM's own unit tests, with the stock layers and with tpinv's (megatron_unit_tests.py), where MEGATRON_LM names a checkout of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

CHECKOUT = os.environ.get("MEGATRON_LM")

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.one_version,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM names no checkout: make test-megatron-lm MEGATRON_LM=path"),
]


def test_what_passes_with_stock_layers_passes_with_tpinvs():
    script = Path(__file__).with_name("megatron_unit_tests.py")
    assert subprocess.run([sys.executable, str(script), CHECKOUT]).returncode == 0
