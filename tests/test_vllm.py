"""vLLM on tpinv, in the real engine on a CPU: make test-vllm, in an environment of its own. Skipped where vLLM is not installed."""

import copy
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from rich.console import Console

from tests.vllm_jobs import layers_without_attention
from tpinv.harness.vllm import model
from tpinv.harness.vllm.verify import Settings, compare, table, verdict
from tpinv.integrations import vllm as plugin
from tpinv.integrations.vllm import doctor, options
from tpinv.testing import RankPool, assert_bitwise_equal

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PRELOAD = [
    "vllm.engine.arg_utils",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
]
ASKED = '{"leaves": 8}'
SPECS = {"llama with biases": (model.Spec(bias=True), "bfloat16"), "qwen3, tied": (model.Spec(qk_norm=True, tied=True), "float16")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: model.write(str(root / str(i)), spec, getattr(torch, dtype)) for i, (name, (spec, dtype)) in enumerate(SPECS.items())}


@pytest.fixture(scope="module", params=["stock", "tpinv"])
def pool(request):
    """A pool for each: what a plugin has replaced stays replaced in a process."""
    with RankPool(PRELOAD) as workers:
        yield request.param, workers


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SPECS)
def test_layers_at_tp_4_with_replicated_heads(pool, checkpoints, name):
    """2 KV heads on 4 ranks, biases, norms of q and k, a tied head: weights through vLLM's own loaders."""
    layers, workers = pool
    tokens = [(7 * i) % 500 + 3 for i in range(37)]
    one, four = (
        workers.run(layers_without_attention, p, layers, checkpoints[name], tokens, SPECS[name][1], timeout=400)[0] for p in (1, 4)
    )
    assert len(one) == 7
    if layers == "stock":
        assert not torch.equal(one["logits"], four["logits"])
        return
    for key, expected in one.items():
        assert_bitwise_equal(four[key], expected)


@pytest.mark.timeout(1500)
def test_engine_whatever_the_schedule_and_the_ranks(capsys):
    """Chunked prefill, cached prefixes, preemption, seeds, top-k and top-p, decode against prefill, a reload; stock differs."""
    console = Console(width=130)
    rows = compare(Settings(sizes=(1, 2), requests=8, timeout=700), console)
    console.print(table(rows))
    assert verdict(rows, console), capsys.readouterr().out
    ours = [row for row in rows if row.layers == "tpinv"]
    assert {row.tp for row in ours} == {1, 2} and sum(row.tokens for row in ours) > 500
    assert all(row.differing == row.tokens for row in rows if row.layers == "stock" and row.tp == 2)


# -- what is refused ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(checkpoints):
    """A VllmConfig of vLLM itself, for one model and any engine arguments."""
    from vllm.engine.arg_utils import EngineArgs

    def make(**arguments):
        arguments = {"max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True, "dtype": "bfloat16"} | arguments
        return EngineArgs(checkpoints["llama with biases"], **arguments).create_engine_config()

    saved = dict(os.environ)
    os.environ.update({"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TPINV_VLLM": ""})
    try:
        yield make
    finally:
        os.environ.clear()
        os.environ.update(saved)


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv("TPINV_VLLM", ASKED)


def check(found):
    from tpinv.integrations.vllm.rules import check_config

    check_config(found)


def test_what_is_covered_passes(config, asked):
    check(config())
    check(config(dtype="float16", enable_prefix_caching=True))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: setattr(c.parallel_config, "tensor_parallel_size", 3), "tensor_parallel_size=3 does not divide leaves=8"),
        (lambda c: setattr(c.parallel_config, "pipeline_parallel_size", 2), "pipeline_parallel_size=2: pipelines"),
        (lambda c: setattr(c.parallel_config, "decode_context_parallel_size", 2), "decode_context_parallel_size=2"),
        (lambda c: setattr(c.parallel_config, "enable_expert_parallel", True), "enable_expert_parallel=True"),
        (lambda c: setattr(c, "speculative_config", object()), "speculative_config"),
        (lambda c: setattr(c, "lora_config", object()), "lora_config"),
        (lambda c: setattr(c, "quant_config", object()), "quant_config"),
        (lambda c: setattr(c.model_config, "quantization", "fp8"), "quantization='fp8'"),
        (lambda c: setattr(c.cache_config, "cache_dtype", "fp8"), "kv_cache_dtype='fp8'"),
        (lambda c: setattr(c.cache_config, "sliding_window", 128), "sliding_window=128"),
        (lambda c: setattr(c.model_config.hf_text_config, "layer_types", ["sliding_attention"]), "only full attention"),
        (lambda c: setattr(c.model_config.hf_text_config, "num_local_experts", 8), "num_local_experts=8"),
        (lambda c: setattr(c.model_config.hf_text_config, "rope_parameters", {"rope_type": "longrope"}), "rope_type='longrope'"),
        (lambda c: setattr(c.model_config, "disable_cascade_attn", False), "disable_cascade_attn=False"),
        (lambda c: setattr(c.compilation_config, "mode", 3), "compilation mode 3"),
        (lambda c: setattr(c.model_config.model_arch_config, "architectures", ["MixtralForCausalLM"]), "MixtralForCausalLM"),
        (lambda c: setattr(c.model_config, "dtype", torch.float64), "dtype=torch.float64"),
        (lambda c: setattr(c.model_config, "model_impl", "transformers"), "model_impl='transformers'"),
    ],
)
def test_what_is_not_covered_is_refused_with_the_fix(config, asked, change, match):
    found = copy.copy(config())
    found.model_config = copy.copy(found.model_config)
    for name in ("hf_config", "model_arch_config"):
        setattr(found.model_config, name, copy.copy(getattr(found.model_config, name)))
    found.model_config.hf_text_config = found.model_config.hf_config
    change(found)
    with pytest.raises(ValueError, match=match) as error:
        check(found)
    assert ";" in str(error.value)  # rule and value; fix


def test_a_model_class_that_another_plugin_has_replaced_is_refused(config, asked, monkeypatch):
    """Nothing would check what it builds."""
    from vllm.model_executor.models.registry import ModelRegistry

    found = config()
    for name in ModelRegistry.models.keys() & {"LlamaForCausalLM"}:
        monkeypatch.setitem(ModelRegistry.models, name, types.SimpleNamespace(module_name="another.plugin"))
    with pytest.raises(ValueError, match="LlamaForCausalLM in vLLM's registry is not tpinv's.*VLLM_PLUGINS=tpinv"):
        check(found)


def test_vllms_own_mode_is_refused(config, asked, monkeypatch):
    found = config()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT"):
        check(found)


def test_graphs_need_an_attention_that_breaks_them(config, asked, monkeypatch):
    from tpinv.integrations.vllm import rules

    found = config()
    found.compilation_config.cudagraph_mode = type(found.compilation_config.cudagraph_mode).FULL_AND_PIECEWISE
    monkeypatch.setattr(rules, "_breaks_at_attention", lambda: True)
    check(found)
    monkeypatch.setattr(rules, "_breaks_at_attention", lambda: False)
    with pytest.raises(ValueError, match="keep the lengths"):
        check(found)


def test_foreign_modules_are_refused():
    from tpinv.integrations.vllm import guard

    with pytest.raises(ValueError, match="0: torch.nn.modules.linear.Linear"):
        guard.check_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), None)


def test_stocks_sums_are_disarmed(monkeypatch):
    from tpinv.integrations.vllm import guard

    communicator = types.SimpleNamespace(all_reduce=lambda x: x, all_gather=lambda x: x)
    monkeypatch.setattr(guard, "get_tp_group", lambda: types.SimpleNamespace(device_communicator=communicator))
    monkeypatch.setattr(guard, "calls", {})
    guard.disarm_stock_collectives()
    with pytest.raises(RuntimeError, match="all_reduce"):
        communicator.all_reduce(1)
    assert communicator.all_gather(1) == 1 and guard.calls == {"all_gather": 1}


def test_whether_attention_breaks_graphs(config, asked):
    """In another process where it does not: vLLM decides it when its attention is imported."""
    from tpinv.integrations.vllm import rules

    config()
    assert os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] == "1" and rules._breaks_at_attention()
    code = "from tpinv.integrations.vllm import rules; print(rules._breaks_at_attention())"
    environment = os.environ | {"VLLM_USE_BREAKABLE_CUDAGRAPH": "0", "TPINV_VLLM": ASKED, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[-1:] == ["False"], done.stderr[-2000:]


@pytest.mark.parametrize("cap", [None, 0, 3.0])
def test_the_backend_takes_windows_caps_and_sinks(cap):
    """As vLLM hands them to a backend, its cap of 0 for none. Which models may have them is rules.py's; today none."""
    from tpinv import functional
    from tpinv.integrations.vllm.attention import TreeAttention, TreeMetadata

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(70, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2))
    sinks = torch.tensor([1.0, -2.0, 0.5, 3.0])
    given = {"sliding_window": 20, "softcap": cap or None, "sinks": sinks}
    impl = TreeAttention(4, 16, 0.3, 2, sliding_window=20, logits_soft_cap=cap, sinks=sinks)
    cache, slots = torch.full((4, 2, 32, 32), float("nan"), dtype=torch.bfloat16), torch.arange(70)
    impl.do_kv_cache_update(None, k, v, cache, slots)
    numbers = [torch.tensor(t, dtype=torch.int32) for t in ([0, 3], [70], [[0, 1, 2, 3]])]
    metadata = TreeMetadata(3, *numbers, slots, 3, 70)
    found = impl.forward(None, q[-3:], None, None, cache, metadata, torch.empty(3, 4, 16, dtype=torch.bfloat16))
    expected = functional.core_attention(*(t.unsqueeze(1) for t in (q, k, v)), scale=0.3, **given)[-3:, 0]
    assert_bitwise_equal(found, expected)
    with pytest.raises(ValueError, match="alibi_slopes is not covered|attention with alibi_slopes"):
        TreeAttention(4, 16, 0.3, 2, alibi_slopes=[1.0] * 4)


def test_probes_do_not_take_the_defaults_that_vllm_sets():
    """vLLM builds models with its GPU and the model's dtype as torch's defaults; "meta" stands for the GPU here."""
    from tpinv.integrations.vllm import defaults
    from tpinv.ops.paged_attention import require_paged

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            with defaults.torchs_own():
                assert (torch.zeros(1).device.type, torch.zeros(1).dtype) == ("cpu", torch.float32)
                require_paged.__wrapped__(torch.device("cpu"), torch.bfloat16, 16)
            assert (torch.zeros(1).device.type, torch.zeros(1).dtype) == ("meta", torch.bfloat16)
            with pytest.raises(Exception, match="generator|meta|Generator"):  # the probe is not one that would not notice
                require_paged.__wrapped__(torch.device("cpu"), torch.bfloat16, 16)
    finally:
        torch.set_default_dtype(torch.float32)


# -- how it is found out that nothing happened --------------------------------------------------------------------------------------


def test_assert_active_names_the_reason(monkeypatch, tmp_path):
    engine = types.SimpleNamespace(
        instance_id="none", parallel_config=types.SimpleNamespace(tensor_parallel_size=2), vllm_config=None, llm_engine=None
    )
    engine = types.SimpleNamespace(llm_engine=types.SimpleNamespace(vllm_config=engine))
    engine.llm_engine.vllm_config.__dict__.pop("vllm_config")
    engine.llm_engine.vllm_config.__dict__.pop("llm_engine")
    monkeypatch.setenv(options.REPORTS, str(tmp_path))
    monkeypatch.delenv("TPINV_VLLM", raising=False)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] of 2: TPINV_VLLM is not set"):
        plugin.assert_active(engine)
    monkeypatch.setenv("TPINV_VLLM", ASKED)
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with pytest.raises(RuntimeError, match="VLLM_PLUGINS='' switches the plugin off"):
        plugin.assert_active(engine)
    monkeypatch.delenv("VLLM_PLUGINS")
    with pytest.raises(RuntimeError, match="not loaded"):
        plugin.assert_active(engine)
    (tmp_path / "none-0.json").write_text('{"rank": 0}')
    with pytest.raises(RuntimeError, match=r"ranks \[1\] of 2"):
        plugin.assert_active(engine)
    (tmp_path / "none-1.json").write_text('{"rank": 1}')
    assert plugin.assert_active(engine) == [{"rank": 0}, {"rank": 1}]


def test_doctor(monkeypatch):
    monkeypatch.setenv("TPINV_VLLM", "")
    assert not doctor.findings()[-1][0] and "not set" in doctor.findings()[-1][1]
    monkeypatch.setenv("TPINV_VLLM", "{")
    assert "no JSON" in doctor.findings()[-1][1]
    monkeypatch.setenv("TPINV_VLLM", ASKED)
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    # In a process of its own: what the plugin replaces stays replaced, for all tests that follow.
    code = "import json; from tpinv.integrations.vllm import doctor; print(json.dumps(doctor.findings()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert [text for fine, text in json.loads(done.stdout.splitlines()[-1]) if not fine] == [
        "VLLM_PLUGINS='other' switches the plugin off; add tpinv to it, or unset it"
    ], done.stderr[-2000:]
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setenv(options.BREAKABLE, "0")
    monkeypatch.setenv(options.REPORTS, "/dev/null")
    wrong = [text for fine, text in doctor.findings() if not fine]
    assert [text.split("=")[0] for text in wrong] == ["VLLM_BATCH_INVARIANT", options.BREAKABLE, options.REPORTS]


def test_without_options_nothing_is_touched(monkeypatch):
    from tpinv.integrations.vllm import install

    monkeypatch.setattr(install, "install", lambda: pytest.fail("installed"))
    monkeypatch.setenv("TPINV_VLLM", "")
    plugin.register()
    monkeypatch.setenv("TPINV_VLLM", ASKED)
    with pytest.raises(pytest.fail.Exception):
        plugin.register()


@pytest.mark.parametrize("text", ["8", "[]", '{"leafs": 8}', "{leaves: 8}"])
def test_options_that_are_refused(monkeypatch, text):
    monkeypatch.setenv("TPINV_VLLM", text)
    with pytest.raises(ValueError, match="TPINV_VLLM"):
        plugin.register()


def test_enable(monkeypatch):
    monkeypatch.setenv("TPINV_VLLM", "")
    plugin.enable(leaves=24, node_dtype="bfloat16")
    assert options.tree().fingerprint == "tpinv1-rfc6962-L24-bfloat16"
    with pytest.raises(ValueError, match="leaves=0"):
        plugin.enable(leaves=0)


def test_what_an_engine_warms_up_runs():
    """On a CPU, where it compiles nothing; on a GPU it is the first request's kernels."""
    from tpinv.integrations.vllm.attention import warm_up

    for block in (16, 32, 128):
        spec = types.SimpleNamespace(head_size=32, block_size=block, num_kv_heads=2, dtype=torch.bfloat16)
        for longest in (300, 40, 1):
            warm_up(spec, 4, longest, torch.device("cpu"))
