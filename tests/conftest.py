import contextlib
import os

# Set before torch is imported: ranks share the cores, and the tests that vary the number of threads say so themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from tpinv.testing import RankPool

hypothesis.settings.register_profile("shared cores", deadline=None, derandomize=True)
hypothesis.settings.load_profile("shared cores")


PRELOAD = {
    "megatron": ["tpinv.harness.megatron.verify"],
    "torchtitan": ["tpinv.harness.torchtitan.verify", "torchtitan.models.llama3", "torchtitan.models.qwen3"],
}


# Long files that keep one core busy: first, so that none of them is left for the end, when the other worker has nothing to do.
FIRST = ["test_kernels_interpreter.py", "test_verified_elsewhere.py", "test_transformers.py", "test_verified.py", "test_across.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(scope="session", autouse=True)
def framework_pools(request):
    """Workers that have imported a framework, which takes seconds, once for all tests: made before any other pool has started one."""
    marks = {mark.name for item in request.session.items for mark in item.iter_markers()}
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(RankPool(preload)) for name, preload in PRELOAD.items() if name in marks}


@pytest.fixture(scope="session")
def megatron_pool(framework_pools):
    return framework_pools["megatron"]


@pytest.fixture(scope="session")
def torchtitan_pool(framework_pools):
    return framework_pools["torchtitan"]
