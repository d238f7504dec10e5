import os

# Set before torch is imported: ranks share the cores, and the tests that vary the number of threads say so themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from tpinv.testing import RankPool

hypothesis.settings.register_profile("shared cores", deadline=None, derandomize=True)
hypothesis.settings.load_profile("shared cores")


@pytest.fixture(scope="session")
def megatron_workers():
    with RankPool(preload=["tpinv.integrations.megatron.verify"]) as pool:
        yield pool


@pytest.fixture(scope="module")
def megatron_pool(megatron_workers):
    """Workers that have imported Megatron-Core, which takes seconds, once for all tests. They end with the module: what they
    trained leaves process groups behind, each with a thread that polls."""
    yield megatron_workers
    megatron_workers.close()


@pytest.fixture(scope="session")
def torchtitan_workers():
    pytest.importorskip("torchtitan")
    with RankPool(preload=["tpinv.integrations.torchtitan.verify"]) as pool:
        yield pool


@pytest.fixture(scope="module")
def torchtitan_pool(torchtitan_workers):
    """The same for TorchTitan."""
    yield torchtitan_workers
    torchtitan_workers.close()
