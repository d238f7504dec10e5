"""Random models for comparisons, as checkpoint directories that vLLM and transformers load."""

import json
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spec:
    """A dense decoder. ``qk_norm`` makes it a Qwen3, else it is a Llama."""

    hidden: int = 128
    intermediate: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    width: int = 32
    vocabulary: int = 512
    qk_norm: bool = False
    tied: bool = False
    bias: bool = False
    longest: int = 2048


# Llama-3-8B's widths, as many layers as one likes
LARGE = Spec(hidden=4096, intermediate=14336, layers=4, heads=32, kv_heads=8, width=128, vocabulary=32000, longest=8192)


LLAMA3_8B = Spec(
    hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, width=128, vocabulary=128256, longest=8192
)  # fmt: skip


def write_config(directory: str, spec: Spec) -> str:
    """config.json alone, of a Llama: vLLM makes up the weights of such a model. Returns ``directory``."""
    found = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": spec.hidden, "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers, "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads, "head_dim": spec.width,
        "vocab_size": spec.vocabulary, "max_position_embeddings": spec.longest, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": spec.tied, "attention_bias": spec.bias,
        "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    }  # fmt: skip
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as file:
        json.dump(found, file)
    return directory


def has_weights(directory: str) -> bool:
    return any(name.endswith((".safetensors", ".bin", ".pt")) for name in os.listdir(directory))


def write(directory: str, spec: Spec, dtype: torch.dtype, device: str = "cpu") -> str:
    """Saves a model with weights of a fixed seed, large enough for its logits to be far apart. Returns ``directory``."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if spec.qk_norm else (LlamaConfig, LlamaForCausalLM)
    config = config_class(
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.width,
        vocab_size=spec.vocabulary,
        max_position_embeddings=spec.longest,
        tie_word_embeddings=spec.tied,
        attention_bias=spec.bias,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device(device):
        model = model_class(config).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.4 * parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    os.makedirs(directory, exist_ok=True)
    model.save_pretrained(directory)
    return directory
