"""Compares two recorded runs (tpinv.testing.record), tensor by tensor: what ``tpinv diff`` prints."""

from tpinv.diff.compare import Comparison, compare_parts, compare_runs
from tpinv.diff.runs import Key, Part, Run, renamed

__all__ = ["Comparison", "Key", "Part", "Run", "compare_parts", "compare_runs", "renamed"]
