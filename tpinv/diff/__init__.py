"""Compares two recorded runs (tpinv.testing.record), tensor by tensor: what ``tpinv diff`` prints."""

from tpinv.diff.runs import Comparison, Key, Part, Run, compare_runs, renamed

__all__ = ["Comparison", "Key", "Part", "Run", "compare_runs", "renamed"]
