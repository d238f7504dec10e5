"""docs/coverage.md says what the code says."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

pytestmark = [pytest.mark.megatron, pytest.mark.one_version]


def test_coverage_is_true(monkeypatch):
    script = Path(__file__).parents[1] / "docs" / "coverage.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--check"])
    assert runpy.run_path(str(script))["main"]() == 0, "run python docs/coverage.py"
