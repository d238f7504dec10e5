"""docs/coverage.md says what the code says."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

pytestmark = [pytest.mark.megatron, pytest.mark.one_version]


def test_coverage_is_true():
    script = Path(__file__).parents[1] / "docs" / "coverage.py"
    assert subprocess.run([sys.executable, str(script), "--check"]).returncode == 0, "run python docs/coverage.py"
