"""The same checkpoint and tokens in transformers, Megatron-Core and TorchTitan, at several sizes: the same logits and log-probabilities.
Stock layers, in the same comparison, differ."""

import pytest

pytest.importorskip("torchtitan")
pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from tpinv.harness import across

pytestmark = pytest.mark.torchtitan
FRAMEWORKS = ("transformers", "megatron", "torchtitan")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    paths = {kind: str(tmp_path_factory.mktemp(kind)) for kind in across.KINDS}
    for kind, path in paths.items():
        across.make_checkpoint(kind, path)
    return paths


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "bf16"), ("llama", "fp32"), ("qwen3", "bf16"), ("qwen3", "fp32")])
def test_frameworks_agree(kind, dtype, checkpoints, torchtitan_pool):
    rows = across.compare_frameworks(FRAMEWORKS, (1, 4), across.Task(checkpoints[kind], "tpinv", dtype), pool=torchtitan_pool)
    assert len(rows) == 8 and {row.tensors for row in rows} == {2}
    assert [row for row in rows if row.differing] == []


def test_stock_frameworks_do_not(checkpoints, torchtitan_pool):
    rows = across.compare_frameworks(FRAMEWORKS, (1, 4), across.Task(checkpoints["llama"], "stock", "bf16"), pool=torchtitan_pool)
    differing = {(row.framework, row.tp) for row in rows if row.differing}
    assert {("megatron", 1), ("megatron", 4), ("torchtitan", 4)} <= differing
