"""The table of sums: complete, printable, and part of the fingerprint; constants are read from it."""

import dataclasses

import pytest

import tpinv
from tpinv import ReductionTree, contract


def test_every_function_that_sums_has_its_rows():
    named = {name for row in contract.SUMS for name in row.op.split(", ")}
    without_sums = {"silu", "gelu", "swiglu", "append_kv", "warmup"}
    made_of_others = {"reduce_add_rms_norm", "row_parallel_add_rms_norm"}
    functions = {name for name in tpinv.__all__ if name[0].islower()}
    assert functions - without_sums - made_of_others <= named
    assert named <= functions


def test_rows_say_what_their_nodes_are():
    tree = ReductionTree(24, "bfloat16")
    assert contract.COLUMN_DX.tree(tree) is tree
    assert contract.COLUMN_DB.tree(tree) == ReductionTree(24)
    assert contract.COLUMN_DB.tree(ReductionTree(24)) == ReductionTree(24)
    with pytest.raises(ValueError, match="no leaves"):
        contract.COLUMN_Y.tree(tree)
    for row in contract.SUMS:
        assert row.cut_by == "-" or row.nodes != contract.NO_TREE or row.order is contract.EXACT, "what ranks cut needs a tree"


def test_the_fingerprint_names_tree_table_and_facts(monkeypatch):
    tree = ReductionTree(8)
    before = contract.fingerprint(tree)
    assert before.startswith(tree.fingerprint) and contract.fingerprint(ReductionTree(8, "bfloat16")) != before
    assert contract.fingerprint(tree, chip="H100", torch="2.13.0") == before + "-chip.H100-torch.2.13.0"
    for name, value in {
        "STEP": 64,
        "SUMS": contract.SUMS[:-1],
        "SUMS ": (*contract.SUMS[:-1], dataclasses.replace(contract.SUMS[-1], nodes=contract.FLOAT32)),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(contract, name.strip(), value)
            contract.table_digest.cache_clear()
            assert contract.fingerprint(tree) != before, name
    contract.table_digest.cache_clear()
    assert contract.fingerprint(tree) == before


def test_markdown_prints_every_row():
    text = contract.markdown()
    for row in contract.SUMS:
        assert f"| {row.result} | {row.over} | {row.cut_by} | {row.order.name} | {row.nodes} |" in text
        assert f"- {row.order.name}: {row.order.rule}" in text
