"""Apex under Megatron-Core, without TransformerEngine and with it, by stand-ins: each in a process of its own."""

import pytest

pytest.importorskip("megatron.core")

from megatron_standins import run_tests

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize("standins", [["apex_standins"], ["te_standins", "apex_standins"]], ids=["apex", "te and apex"])
def test_with(standins):
    run_tests(standins, "import_paths.py", "apex_cases.py")
