"""What tests/test_vllm.py runs on ranks: vLLM's own model over gloo, without an engine around it, and so without attention."""

import os

import torch
import torch.distributed as dist


def layers_without_attention(layers: str, checkpoint: str, tokens: list[int], dtype: str) -> dict[str, torch.Tensor]:
    """Logits of a warm-up pass, in which attention gives zeros, and the whole q, k, v of every layer. Rank 0 has the shards of all."""
    os.environ["TPINV_VLLM"] = '{"leaves": 8}' if layers == "tpinv" else ""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_DIST_IDENT": str(os.getppid())}
    torch.accelerator.empty_cache = lambda: None  # as vLLM's own runner for CPUs does
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader import get_model

    # An engine would ask for the workers that this rank is one of; the ranks are here already.
    config = EngineArgs(checkpoint, dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, max_model_len=256).create_engine_config()
    config.parallel_config.tensor_parallel_size = dist.get_world_size()
    shards: dict[str, torch.Tensor] = {}
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(dist.get_world_size(), dist.get_rank(), "env://", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(dist.get_world_size(), 1)
        try:
            model = get_model(vllm_config=config)
            for name, module in model.named_modules():
                if name.endswith("qkv_proj"):
                    module.register_forward_hook(lambda module, _, y, name=name: shards.__setitem__(name, y[0]))
            ids = torch.tensor(tokens)
            with torch.inference_mode(), set_forward_context(None, config, num_tokens=len(ids)):
                hidden = model(ids, torch.arange(len(ids)), None)
                results = {"logits": model.compute_logits(hidden)}
            spec = config.model_config.hf_config
            for name, shard in shards.items():
                results |= _whole_heads(name, shard, spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim)
            return results
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state._WORLD = None


def _whole_heads(name: str, shard: torch.Tensor, heads: int, kv_heads: int, width: int) -> dict[str, torch.Tensor]:
    """[M, (q + k + v) of this rank] -> whole q, k, v on every rank; replicated heads must be the same bytes on all that hold them."""
    ranks = dist.get_world_size()
    sizes = [heads // ranks * width, *[max(1, kv_heads // ranks) * width] * 2]
    found = {}
    for part, piece in zip("qkv", shard.split(sizes, -1), strict=True):
        every = [torch.empty_like(piece.contiguous()) for _ in range(ranks)]
        dist.all_gather(every, piece.contiguous())
        copies = max(1, ranks // kv_heads) if part != "q" else 1
        for i, one in enumerate(every):
            assert torch.equal(one.view(torch.uint8), every[i // copies * copies].view(torch.uint8)), f"{name}: replicas of {part} differ"
        found[f"{name} {part}"] = torch.cat(every[::copies], -1)
    return found
