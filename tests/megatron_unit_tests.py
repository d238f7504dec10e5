"""Megatron-LM's own unit tests on a CPU, with the stock layers and with tpinv's in their place.

    git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM    # the version of the installed megatron-core
    python tests/megatron_unit_tests.py Megatron-LM                          # both, and what passes with stock and fails with tpinv
    make test-megatron-lm MEGATRON_LM=Megatron-LM                            # the same as a test

Exit status 0 only if every test that passes with the stock layers passes with tpinv's, but for those in ``EXPECTED``, each with its reason.
As a pytest plugin (``-p megatron_unit_tests``, with ``--tpinv`` or without) this file

- stands in for CUDA: what asks for a GPU gets CPU tensors, NCCL is gloo, random states are torch's (tpinv.integrations.megatron.on_cpu and
  the rest of ``_stand_in``); tests that are skipped without CUDA run;
- with ``--tpinv`` puts tpinv's layers where Megatron's modules name the stock ones: linears, embeddings, norms, core attention, cross-entropy;
- notes every test's outcome, and whether any of tpinv's layers was built or ran in it.

None of Megatron-LM's files is in this repository.
"""

import argparse
import contextlib
import functools
import gc
import inspect
import json
import linecache
import os
import socket
import subprocess
import sys
import tempfile
import types
from datetime import timedelta
from pathlib import Path

import pytest

PATHS = (
    "tensor_parallel",
    "transformer/test_attention.py",
    "transformer/test_attention_no_rope.py",
    "transformer/test_core_attention.py",
    "transformer/test_mlp.py",
    "transformer/test_module.py",
    "transformer/test_relative_attention.py",
    "transformer/test_rope.py",
    "transformer/test_transformer_block.py",
    "transformer/test_transformer_layer.py",
    "transformer/test_utils.py",
    "models/test_base_embedding.py",
    "models/test_gpt_model.py",
)
# The end of a test's name -> why it fails with tpinv's layers, on purpose.
EXPECTED: dict[str, str] = {}


# -- the plugin -------------------------------------------------------------------------------------------------------------------


class _Seen:
    def __init__(self):
        self.outcomes: dict[str, str] = {}
        self.calls = 0
        self.reached: set[str] = set()


_seen = _Seen()


def pytest_addoption(parser) -> None:
    _without_its_data()
    parser.addoption("--tpinv", action="store_true", help="tpinv's layers in the place of Megatron's")
    parser.addoption("--leaves", type=int, default=8, help="of the tree; must divide every sharded dimension of the tests' models")
    parser.addoption("--outcomes", help="file for every test's outcome, as JSON")


def pytest_configure(config) -> None:
    _stand_in()
    if config.getoption("--tpinv"):
        _swap(config.getoption("--leaves"))


def pytest_collection_finish(session) -> None:
    """``skipif(not torch.cuda.is_available())`` has been evaluated by now; the code itself must not be told that there is CUDA."""
    import torch

    torch.cuda.is_available = lambda: False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    before = _seen.calls
    result = yield
    if _seen.calls > before:
        _seen.reached.add(item.nodeid)
    return result


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.outcome != "passed":
        if _seen.outcomes.get(report.nodeid) != "failed":
            _seen.outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session) -> None:
    if path := session.config.getoption("--outcomes"):
        Path(path).write_text(json.dumps({"outcomes": _seen.outcomes, "reached": sorted(_seen.reached)}))


def _stand_in() -> None:
    import megatron.core.parallel_state
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.utils
    import torch
    import torch.distributed as dist
    from megatron.core.models.gpt import gpt_layer_specs
    from packaging.version import Version

    from tpinv.integrations.megatron import on_cpu

    _seen.stand_in = contextlib.ExitStack()  # kept, or it would end here
    _seen.stand_in.enter_context(on_cpu())
    _seen.stand_in.enter_context(_device_as_asked_for())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    init = dist.init_process_group

    def init_process_group(backend=None, **arguments):
        return init("gloo", **{"timeout": timedelta(seconds=60), **arguments})  # a rank that failed leaves the others waiting

    dist.init_process_group = init_process_group
    for name, value in {
        "device_count": lambda: world,
        "set_device": lambda device: None,
        "is_available": lambda: True,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "get_device_name": lambda *_: "CPU",
        "get_device_capability": lambda *_: (9, 0),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
    }.items():
        setattr(torch.cuda, name, value)
    torch.nn.Module.cuda = lambda self, device=None: self

    def model_parallel_cuda_manual_seed(seed: int, *_, **__) -> None:
        torch.manual_seed(seed)

    destroy = megatron.core.parallel_state.destroy_model_parallel

    def destroy_model_parallel() -> None:
        destroy()  # which leaves the groups: hundreds of gloo's, with threads that poll
        for group in [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
            dist.destroy_process_group(group)
        if len(os.listdir("/proc/self/task")) > 200:
            gc.collect()  # tests' models hold theirs

    _replace(destroy, destroy_model_parallel)
    megatron.core.parallel_state.destroy_model_parallel = destroy_model_parallel
    for name in ("get_te_version", "get_fa_version"):  # compared with numbers, also where neither is installed
        setattr(megatron.core.utils, name, lambda: Version("0.0"))
    # TransformerEngine is not there: what asks for its layers gets the local ones, and a test that asks about fp8 hears no.
    known = inspect.signature(gpt_layer_specs.get_gpt_layer_local_spec).parameters

    def local_spec(*args, **settings):
        return gpt_layer_specs.get_gpt_layer_local_spec(*args, **{name: value for name, value in settings.items() if name in known})

    _replace(gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec, local_spec)
    engine, torch_engine = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    torch_engine.fp8 = types.ModuleType("transformer_engine.pytorch.fp8")
    torch_engine.fp8.check_fp8_support = lambda: (False, "no TransformerEngine")
    engine.pytorch = torch_engine
    sys.modules |= {module.__name__: module for module in (engine, torch_engine, torch_engine.fp8)}
    _replace(megatron_random.model_parallel_cuda_manual_seed, model_parallel_cuda_manual_seed)


def _device_as_asked_for():
    """A mode in which a test that asserts ``tensor.device.type == 'cuda'`` is told so; everybody else gets the true device."""
    import torch
    from torch.overrides import TorchFunctionMode

    class AsAskedFor(TorchFunctionMode):
        def __torch_function__(self, function, kinds, args=(), kwargs=None):
            if function == torch.Tensor.device.__get__:
                code, line = sys._getframe(1).f_code.co_filename, sys._getframe(1).f_lineno
                if "unit_tests" in code and ".device.type == 'cuda'" in linecache.getline(code, line):
                    return types.SimpleNamespace(type="cuda")
            return function(*args, **(kwargs or {}))

    return AsAskedFor()


def _without_its_data() -> None:
    """What the conftest imports and none of the tests above uses. Before it is imported."""
    sys.modules.setdefault("six", types.SimpleNamespace(PY2=False, PY3=True))
    name = "tests.test_utils.python_scripts.download_unit_tests_dataset"
    sys.modules[name] = types.SimpleNamespace(download_and_extract_asset=lambda **_: None)


def _replace(stock, other) -> None:
    """Wherever an imported module of Megatron's knows ``stock`` by whatever name; a class not where it is defined, which calls it by name."""
    home = stock.__module__ if isinstance(stock, type) else None
    for module in [m for name, m in sys.modules.items() if name.startswith("megatron.") and name != home and m is not None]:
        for key, value in list(vars(module).items()):
            if value is stock:
                setattr(module, key, other)


def _counted(method):
    @functools.wraps(method)
    def counted(*args, **kwargs):
        _seen.calls += 1
        return method(*args, **kwargs)

    return counted


def _swap(leaves: int) -> None:
    import megatron.core.models.bert.bert_layer_specs
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.transformer.transformer_block
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from tpinv import ReductionTree, functional
    from tpinv.integrations.megatron import layers
    from tpinv.integrations.megatron.attention import TPInvariantDotProductAttention

    tree = ReductionTree(leaves)
    layers.TreeBound.converted = True  # the tests build layers by themselves, or models that are never converted

    def counting(kind: type) -> type:
        for name in ("__init__", "forward"):
            setattr(kind, name, _counted(getattr(kind, name)))
        return kind

    for stock, ours in [
        (ColumnParallelLinear, layers.TPInvariantColumnParallelLinear),
        (RowParallelLinear, layers.TPInvariantRowParallelLinear),
        (VocabParallelEmbedding, layers.TPInvariantVocabParallelEmbedding),
    ]:
        _replace(stock, counting(ours).bind(tree))
    _replace(DotProductAttention, counting(TPInvariantDotProductAttention))
    counting(layers.TPInvariantRMSNorm), counting(layers.TPInvariantLayerNorm)
    _replace(WrappedTorchNorm, layers.TPInvariantNorm.bind(tree))

    def vocab_parallel_cross_entropy(vocab_parallel_logits, target, label_smoothing=0.0, tp_group=None):
        _seen.calls += 1
        group = tp_group or megatron.core.parallel_state.get_tensor_model_parallel_group()
        return functional.vocab_parallel_cross_entropy(
            vocab_parallel_logits, target, tree=tree, group=group, label_smoothing=label_smoothing
        )

    _replace(tensor_parallel.vocab_parallel_cross_entropy, vocab_parallel_cross_entropy)
    torch.manual_seed(0)


# -- the command ------------------------------------------------------------------------------------------------------------------


def run(checkout: Path, *, tpinv: bool, leaves: int, ranks: int, paths: list[str]) -> dict:
    """One pytest process for each rank. Returns {"outcomes": {test: outcome}, "reached": [test, ...]}: the worst of all ranks."""
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "pytest", "-p", "megatron_unit_tests", "-p", "no:cacheprovider", "-q", "--no-header", "--tb=line"]
    command += ["-o", "addopts=", f"--leaves={leaves}", *(["--tpinv"] if tpinv else [])]
    command += [str(checkout / "tests" / "unit_tests" / path) for path in paths]
    places = [str(here), str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        started = []
        for rank in range(ranks):
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(places), "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
            }  # fmt: skip
            with open(Path(directory) / f"log{rank}", "w") as log:
                outcomes = [f"--outcomes={directory}/{rank}.json"]
                started.append(subprocess.Popen(command + outcomes, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT))
        for process in started:
            process.wait()
        worst: dict[str, str] = {}
        reached: set[str] = set()
        for rank in range(ranks):
            if not (path := Path(directory) / f"{rank}.json").exists():
                raise RuntimeError(f"rank {rank} ended before any test:\n{(Path(directory) / f'log{rank}').read_text()[-3000:]}")
            found = json.loads(path.read_text())
            reached |= set(found["reached"])
            for name, outcome in found["outcomes"].items():
                worst[name] = max(worst.get(name, "passed"), outcome, key=["passed", "skipped", "failed"].index)
        return {"outcomes": worst, "reached": sorted(reached)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of Megatron-LM of the installed megatron-core's version")
    parser.add_argument("--leaves", type=int, help="of the tree; by default the ranks, or 2 for one")
    parser.add_argument("--ranks", type=int, default=1, help="processes of half a gigabyte; some tests ask for 2, 4 or 8")
    parser.add_argument("paths", nargs="*", default=list(PATHS), help="under tests/unit_tests")
    arguments = parser.parse_args()
    checkout, leaves = arguments.checkout.resolve(), arguments.leaves or max(2, arguments.ranks)
    if not (checkout / "tests" / "unit_tests").is_dir():
        parser.error(f"{checkout} has no tests/unit_tests; clone Megatron-LM at the tag of the installed version")
    stock, ours = (run(checkout, tpinv=tpinv, leaves=leaves, ranks=arguments.ranks, paths=arguments.paths) for tpinv in (False, True))
    passing = [name for name, outcome in stock["outcomes"].items() if outcome == "passed"]
    failing = [name for name in passing if ours["outcomes"].get(name) != "passed"]
    reached = set(ours["reached"])
    named = {name: why for name in failing for end, why in EXPECTED.items() if name.endswith(end)}
    print(f"{'':40}{'tests':>7}{'stock':>7}{'reached':>9}{'tpinv':>7}")
    for path in arguments.paths:
        here = [name for name in stock["outcomes"] if f"unit_tests/{path}" in name]
        good = [name for name in here if name in set(passing)]
        row = len(here), len(good), len(reached & set(good)), len(set(good) - set(failing))
        print("{:40}{:7}{:7}{:9}{:7}".format(path, *row))
    print(
        f"{len(stock['outcomes'])} tests; with stock layers {len(passing)} pass, of which {len(reached & set(passing))} reach tpinv's layers"
    )
    print(f"with tpinv's layers {len(passing) - len(failing)} of these pass")
    for name in failing:
        print(f"  fails: {name}{': ' + named[name] if name in named else ''}")
    return 1 if set(failing) - set(named) else 0


if __name__ == "__main__":
    sys.exit(main())
