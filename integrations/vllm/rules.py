"""Settings that cannot be invariant, or are not shown to be, are refused in every worker before its model is built: rule, value, fix."""

import os

import torch

from tpinv.integrations.vllm import options, speculation

ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
_ROPE = ("default", "llama3", "linear", "yarn")


def _rules(config, tree):
    """(holds, rule and value, fix) for a VllmConfig. A setting that another version lacks is None."""
    model, parallel, cache, compilation = config.model_config, config.parallel_config, config.cache_config, config.compilation_config
    text = model.hf_text_config
    on_gpu = config.device_config.device_type == "cuda"

    def get(owner, name, default=None):
        return getattr(owner, name, default)

    architectures = list(model.architectures)
    yield (
        bool(architectures) and architectures[0] in ARCHITECTURES,
        f"architectures={architectures} are not covered",
        f"use a model of {', '.join(ARCHITECTURES)}",
    )
    implementation = get(model, "model_impl", "auto")
    implementation = str(getattr(implementation, "value", implementation))
    yield (
        implementation in ("auto", "vllm"),
        f"model_impl={implementation!r} builds the model of classes that are not checked",
        "leave it at 'auto', or set 'vllm'",
    )
    others = [name for name in architectures if name in ARCHITECTURES and _is_anothers(name)]
    yield (
        not others,
        f"the class of {', '.join(others)} in vLLM's registry is not tpinv's: another plugin has taken its place, and nothing would be checked",
        "set VLLM_PLUGINS=tpinv",
    )
    dtypes = (torch.bfloat16, torch.float16) if on_gpu else (torch.bfloat16, torch.float16, torch.float32)
    yield model.dtype in dtypes, f"dtype={model.dtype} is not covered on {config.device_config.device_type}", f"use one of {dtypes}"
    tp = parallel.tensor_parallel_size
    yield (
        tree.leaves % tp == 0,
        f"tensor_parallel_size={tp} does not divide leaves={tree.leaves}",
        f"set {options.VARIABLE} to leaves that are a multiple of every size, such as 8 or 24",
    )
    off = [  # (owner, setting, what it must be, why)
        (config, "quant_config", None, "scales are taken from a rank's shard"),
        (model, "quantization", None, "scales are taken from a rank's shard"),
        (config, "lora_config", None, "LoRA's products are not covered"),
        (config, "kv_transfer_config", None, "keys and values of another engine are not known to be ours"),
        (config, "ec_transfer_config", None, "encoders are not covered"),
        (parallel, "pipeline_parallel_size", 1, "pipelines are not covered"),
        (parallel, "decode_context_parallel_size", 1, "context parallelism is not covered"),
        (parallel, "prefill_context_parallel_size", 1, "context parallelism is not covered"),
        (parallel, "enable_expert_parallel", False, "mixture of experts is not covered"),
        (parallel, "enable_dbo", False, "microbatching is not covered"),
        (model, "is_moe", False, "mixture of experts is not covered"),
        (model, "is_multimodal_model", False, "multimodal models are not covered"),
        (cache, "sliding_window", None, "a sliding window is not covered"),
        (cache, "kv_sharing_fast_prefill", False, "shared keys and values are not covered"),
        (cache, "cpu_offload_gb", 0, "offloaded weights bypass the layers"),
        (text, "final_logit_softcapping", None, "capped logits are not covered"),
        (text, "attn_logit_softcapping", None, "capped scores are not covered"),
        (text, "num_local_experts", None, "mixture of experts is not covered"),
        (model, "rswa_window", None, "a sliding window is not covered"),
    ]
    for owner, name, wanted, why in off:
        value = get(owner, name, wanted)
        yield value == wanted or (not value and not wanted), f"{name}={value!r}: {why}", f"set it to {wanted!r}, or leave it out"
    yield from speculation.rules(config)
    yield (
        get(model, "runner_type", "generate") == "generate",
        f"runner_type={get(model, 'runner_type')!r}: only generation is covered",
        "use a model that generates",
    )
    yield (
        cache.cache_dtype in ("auto", str(model.dtype).removeprefix("torch.")),
        f"kv_cache_dtype={cache.cache_dtype!r}: a cache of another dtype is not covered",
        "leave it at 'auto'",
    )
    layer_types = get(text, "layer_types") or []
    yield (
        not any("full" not in kind for kind in layer_types),
        f"layer_types hold {sorted({kind for kind in layer_types if 'full' not in kind})}: only full attention is covered",
        "use a model without sliding windows",
    )
    yield get(text, "is_causal", True) in (True, None), "is_causal=False: only causal attention is covered", "use a decoder"
    yield (
        get(model, "disable_cascade_attn", True) is not False,
        "disable_cascade_attn=False: cascade attention splits keys by what requests share",
        "set disable_cascade_attn=True",
    )
    yield (
        int(compilation.mode or 0) == 0,
        f"compilation mode {compilation.mode}: what torch.compile fuses between tpinv's operators it rounds differently",
        "set VLLM_USE_BREAKABLE_CUDAGRAPH=1 (CUDA graphs without torch.compile) or enforce_eager=True",
    )
    yield (
        not get(compilation, "cudagraph_mode") or not compilation.cudagraph_mode.has_piecewise_cudagraphs() or _breaks_at_attention(),
        f"cudagraph_mode={get(compilation, 'cudagraph_mode')}, but vLLM's attention was imported while {options.BREAKABLE} was not set, so that "
        "a graph would not break there and keep the lengths it was captured with",
        f"set {options.BREAKABLE}=1, or call tpinv.integrations.vllm.enable(), before vLLM is imported",
    )
    yield (
        os.environ.get("VLLM_BATCH_INVARIANT", "0") != "1",
        "VLLM_BATCH_INVARIANT=1 replaces operations underneath tpinv's own and slows the collectives down",
        "unset it; tpinv is invariant to the batch as well",
    )
    rope = get(text, "rope_parameters") or get(text, "rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "default"
    yield kind in _ROPE, f"rope_type={kind!r} is not covered", f"use a model with one of {', '.join(_ROPE)}"


def _is_anothers(architecture: str) -> bool:
    """Whether vLLM builds neither our subclass nor its own class for it. (Ours checks the model it has built.)"""
    from vllm.model_executor.models.registry import ModelRegistry

    from tpinv.integrations.vllm import models

    registered = ModelRegistry.models.get(architecture)
    module = getattr(registered, "module_name", None) or getattr(getattr(registered, "model_cls", None), "__module__", "")
    return module != models.MODULE and not module.startswith("vllm.model_executor.models.")


def _breaks_at_attention() -> bool:
    """Whether vLLM's attention is what breaks a capture: it decides that when its module is imported."""
    from vllm.compilation import breakable_cudagraph
    from vllm.model_executor.layers.attention import attention

    return attention.unified_attention_with_output.__code__.co_filename == breakable_cudagraph.__file__


def check_config(config) -> None:
    """ValueError naming every setting that keeps a model from being invariant."""
    broken = [f"  - {rule}; {fix}" for holds, rule, fix in _rules(config, options.tree()) if not holds]
    if broken:
        raise ValueError("tpinv cannot make this engine invariant to the tensor-parallel size and the batch:\n" + "\n".join(broken))


def check_current_config() -> None:
    """For layers, which are replaced in every model: one that is not covered is refused by the first of them."""
    from vllm.config import get_current_vllm_config

    if speculation.is_drafting():  # whose bits no answer depends on
        return
    check_config(get_current_vllm_config())
