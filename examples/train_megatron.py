"""Trains a Megatron-Core GPT with tpinv's layers: a script to adapt. The lines it prints are the same at every tensor-parallel size.

    torchrun --nproc-per-node 1 examples/train_megatron.py > tp1.txt
    torchrun --nproc-per-node 4 examples/train_megatron.py > tp4.txt
    cmp tp1.txt tp4.txt && echo the same bytes

It uses NCCL on GPUs, and gloo on a machine without. ``--stock`` leaves Megatron's layers as they are: the files then differ.
What makes the difference is marked (1), (2) and (3); the rest is what any Megatron-Core script does.
"""

import argparse
import hashlib
import json

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from tpinv import ReductionTree
from tpinv.integrations.megatron import convert, convert_optimizer, gpt_layer_spec, on_cpu, padded_vocab_size

SEQUENCE, BATCH = 64, 4


def build(arguments, tree: ReductionTree, device: torch.device):
    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=16,
        num_query_groups=8,  # the largest tensor-parallel size is the number of query groups
        ffn_hidden_size=512,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,  # dropout draws from a stream per rank: convert refuses it
        attention_dropout=0.0,
        tensor_model_parallel_size=dist.get_world_size(),
        sequence_parallel=arguments.sequence_parallel and dist.get_world_size() > 1,
        use_cpu_initialization=True,  # draws whole weights and shards them; on GPUs every shard has its own seed
        masked_softmax_fusion=False,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
    )
    local = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(
        config,
        transformer_layer_spec=local if arguments.stock else gpt_layer_spec(config, tree=tree),  # (1) only needed for sequence parallelism
        vocab_size=padded_vocab_size(256, tree),  # does not depend on the tensor-parallel size
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    if not arguments.stock:
        convert(model, tree=tree, tokenizer_vocab_size=256)  # (2) every linear, norm and embedding, the attention and the loss
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), Float16Module(config, model.to(device))
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16), [model]
    )
    if not arguments.stock:
        convert_optimizer(optimizer)  # (3) the gradient norm
    return model, optimizer


def train(arguments, device: torch.device) -> None:
    torch.manual_seed(arguments.seed)
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(arguments.seed)
    model, optimizer = build(arguments, ReductionTree(arguments.leaves), device)
    with open(json.__file__, "rb") as file:
        text = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long().to(device)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, device=device).triu(1).bool()
    positions = torch.arange(SEQUENCE, device=device).expand(BATCH, -1)
    for step in range(arguments.steps):
        start = step * BATCH * SEQUENCE
        tokens, labels = (text[start + shift : start + shift + BATCH * SEQUENCE].view(BATCH, -1) for shift in (0, 1))
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(tokens, positions, mask, labels=labels).mean()
        loss.backward()
        finalize_model_grads([model])
        _, norm, _ = optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step}  loss {loss.item().hex()}  gradient norm {float(norm).hex()}", flush=True)
    norms = [parameter for name, parameter in model.named_parameters() if "layernorm" in name]
    digest = hashlib.sha256(b"".join(parameter.detach().float().cpu().numpy().tobytes() for parameter in norms)).hexdigest()
    if dist.get_rank() == 0:
        print(f"norm weights {digest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--stock", action="store_true", help="Megatron's own layers (without --sequence-parallel)")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    with on_cpu():  # does nothing on GPUs
        train(arguments, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
