"""LlamaForCausalLM and Qwen3ForCausalLM of vLLM with rules.py before and guard.py after them. Imported by vLLM's registry, by name."""

from vllm.model_executor.models import llama, qwen3

from tpinv.integrations.vllm import guard, rules, speculation


class _Checked:
    def __init__(self, *, vllm_config, prefix: str = "", **others):
        if speculation.is_drafting():  # whose bits no answer depends on
            super().__init__(vllm_config=vllm_config, prefix=prefix, **others)
            return
        rules.check_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **others)
        guard.check_model(self, vllm_config)


class LlamaForCausalLM(_Checked, llama.LlamaForCausalLM):
    pass


class Qwen3ForCausalLM(_Checked, qwen3.Qwen3ForCausalLM):
    pass
