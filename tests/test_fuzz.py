"""A part of the fuzz (tests/fuzz.py) in every run of the tests; its numbers are those of the command, so that a failure can be repeated."""

from fuzz import fuzz

CASES = 400


def test_random_cases_have_the_bytes_of_one_rank():
    assert fuzz(0, CASES) == []


def test_stock_functions_differ_in_the_same_comparison():
    differing = {line.split("function='")[1].split("'")[0] for line in fuzz(0, CASES // 2, stock=True)}
    assert {"column", "row", "layer_norm", "cross_entropy", "activation", "tree_all_reduce"} <= differing
