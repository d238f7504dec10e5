"""What ``tpinv verify --framework torchtitan`` trains: a small decoder, real text, and a Trainer.Config around them.

Everything that is not the subject is equal on purpose: tokens are bytes of real text, attention is torch's (FlexAttention has no
backward on a CPU), bf16 runs keep fp32 master weights as FSDP does.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import tpinv.integrations.torchtitan  # isort: skip  # noqa: F401  before torchtitan
import torch
from torch import nn
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import CompileConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.override import OverrideConfig
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.distributed.compile import apply_compile
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.parallelize import parallelize_llama
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.models.qwen3.parallelize import parallelize_qwen3
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from tpinv.harness.own import OwnRun
from tpinv.testing.text import real_text
from tpinv.tree import ReductionTree

OVERRIDE = "tpinv.integrations.torchtitan.invariant"
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
DTENSOR_FSDP = TORCH >= (2, 12)
SPMD_FSDP = TORCH >= (2, 14)  # below, FSDP cannot shard the plain tensors of the default backend at TP > 1
STOCK_TRAINS = DTENSOR_FSDP  # without FSDP nobody adds up the gradients of stock's replicated parameters, and its ranks drift apart


@dataclass(frozen=True)
class Run:
    """One run of the comparison. ``sizes`` are all tensor-parallel sizes compared, so that one model fits every one of them."""

    layers: str  # "stock" or "tpinv"
    tp: int
    sequence_parallel: bool
    sizes: tuple[int, ...]
    leaves: int = 8
    variant: str = "llama"
    dtype: str = "fp32"
    steps: int = 5
    micro_batches: int = 1
    tied: bool = False
    qk_norm: bool = False  # Qwen3's model
    fused_qkv: bool = True
    num_layers: int = 2
    dp: int = 1  # replicas of the model, by FSDP; the run takes dp x tp ranks
    selective_ac: bool = False
    compile: str = ""  # torch.compile's backend for every block; none if empty
    seed: int = 1234
    backend: str = "partial_dtensor" if DTENSOR_FSDP and not SPMD_FSDP else "spmd_types"
    device: str = "cpu"  # or "cuda", the current GPU
    hidden: int = 0  # about, with heads of 128; 0: as small as can be

    def __post_init__(self):
        if self.variant != "llama":
            raise ValueError(f"variant {self.variant!r} is no model of TorchTitan; use llama (with qk-norm: Qwen3)")

    @property
    def tree(self) -> ReductionTree:
        return ReductionTree(self.leaves)

    @property
    def sequence(self) -> int:
        fits = math.lcm(2, *self.sizes)  # 2 chunks of the loss
        return -(-(128 if self.hidden else 48) // fits) * fits


def build_model_config(run: Run) -> Llama3Model.Config | Qwen3Model.Config:
    """The smallest decoder in which every sharded dimension has ``leaves`` equal leaves and every size divides the key-value heads."""
    groups = math.lcm(*run.sizes)
    heads, width = 2 * groups, 16 if groups <= 8 else 8
    if run.hidden:
        heads, width = groups * max(1, run.hidden // (128 * groups)), 128
    dim = math.lcm(heads * width, run.leaves)
    head_dim, vocab = dim // heads, -(-256 // run.leaves) * run.leaves
    weight = {"weight": partial(nn.init.trunc_normal_, std=0.05)}
    table = {"weight": partial(nn.init.normal_, std=1.0)}
    norm = RMSNorm.Config(normalized_shape=dim, param_init={"weight": nn.init.ones_})
    block, rope = (Qwen3TransformerBlock, CosSinRoPE) if run.qk_norm else (Llama3TransformerBlock, ComplexRoPE)

    def layer():
        return block.Config(
            attention_norm=replace(norm),
            ffn_norm=replace(norm),
            attention=make_gqa_config(
                dim=dim,
                n_heads=heads,
                n_kv_heads=groups,
                head_dim=head_dim if run.qk_norm else None,
                wqkv_param_init=weight,
                wo_param_init=weight,
                inner_attention=ScaledDotProductAttention.Config(),
                rope=rope.Config(dim=head_dim, max_seq_len=1024, theta=10000),
                fuse_qkv=run.fused_qkv,
                qk_norm=replace(norm, normalized_shape=head_dim) if run.qk_norm else None,
            ),
            feed_forward=make_ffn_config(
                dim=dim,
                # on purpose no multiple of a vector (see tpinv/ops/activation.py), but where speed counts
                hidden_dim=2 * dim + (0 if run.hidden else run.leaves),
                w1_param_init=weight,
                w2w3_param_init=weight,
            ),
        )

    return (Qwen3Model if run.qk_norm else Llama3Model).Config(
        dim=dim,
        vocab_size=vocab,
        enable_weight_tying=run.tied,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab, embedding_dim=dim, param_init={"weight": skip_param_init} if run.tied else table
        ),
        norm=norm,
        lm_head=Linear.Config(in_features=dim, out_features=vocab, param_init=weight),
        layers=[layer() for _ in range(run.num_layers)],
    )


def build_trainer_config(run: Run, model, folder: str) -> Trainer.Config:
    fsdp = run.backend == "partial_dtensor" or SPMD_FSDP
    if run.backend == "partial_dtensor" and not DTENSOR_FSDP:  # here, not in Run: a Run must be describable everywhere, by tests above all
        raise ValueError(
            f"TorchTitan's DTensor backend with FSDP crashes in the backward pass of torch 2.11, stock or not; torch is {torch.__version__}, "
            'use 2.13 or newer, or backend="spmd_types"'
        )
    param_dtype = "bfloat16" if run.dtype == "bf16" else "float32"
    return Trainer.Config(
        model_spec=ModelSpec(
            name="qwen3" if run.qk_norm else "llama3",
            flavor="tpinv verify",
            model=model,
            parallelize_fn=(parallelize_qwen3 if run.qk_norm else parallelize_llama) if fsdp else parallelize_without_fsdp,
            pipelining_fn=None,
            post_optimizer_build_fn=None,
            state_dict_adapter=None,
        ),
        dump_folder=folder,
        tokenizer=NoTokenizer.Config(),
        dataloader=TextDataLoader.Config(),
        loss=ChunkedLossWrapper.Config(num_chunks=2, loss_fn=CrossEntropyLoss.Config(global_vocab_size=model.vocab_size)),
        optimizer=default_adamw(lr=3e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
        training=TrainingConfig(
            local_batch_size=2,
            global_batch_size=2 * run.micro_batches * run.dp,
            seq_len=run.sequence,
            steps=run.steps,
            disable_cuda_graphs=True,  # as the override leaves them, and as ranks that share a GPU (gloo) need
            dtype="float32" if fsdp else param_dtype,
            mixed_precision_param=param_dtype,
        ),
        parallelism=ParallelismConfig(
            tensor_parallel_degree=run.tp, enable_sequence_parallel=run.sequence_parallel, spmd_backend=run.backend
        ),
        metrics=MetricsProcessor.Config(log_freq=1, disable_color_printing=True),
        checkpoint=CheckpointManager.Config(enable=False),
        activation_checkpoint=SelectiveAC.Config() if run.selective_ac else None,
        compile=CompileConfig(enable=bool(run.compile), components=["model"], backend=run.compile or "inductor"),
        debug=DebugConfig(seed=run.seed, enable_structured_logging=False),
        override=OverrideConfig(imports=[(OVERRIDE, {"leaves": run.leaves})] if run.layers == "tpinv" else []),
    )


def own_trainer_config(own: OwnRun, run: Run, given, folder: str) -> Trainer.Config:
    """The Trainer.Config of a run of the user's model: ``given`` is a model's Config, a ModelSpec, or a Trainer.Config.

    Of a Trainer.Config everything stays but what the comparison is about: tensor and sequence parallelism, the override, the number of
    steps, the seed, the folder; checkpoints and CUDA graphs are off. It must have no override, which the stock run must not have.
    """
    if isinstance(given, ModelSpec):
        made = build_trainer_config(run, given.model, folder)
        return replace(made, model_spec=given)
    if isinstance(given, BaseModel.Config):
        return build_trainer_config(run, given, folder)
    if not isinstance(given, Trainer.Config):
        raise ValueError(f"{own.model} returned a {type(given).__name__}; return a Trainer.Config, a ModelSpec or a model's Config")
    if given.override.imports:
        raise ValueError(
            f"{own.model} names overrides ({given.override.imports}), which a stock run must not have; verify adds tpinv's own"
        )
    parallelism = given.parallelism
    for name in ("data_parallel_replicate_degree", "context_parallel_degree", "pipeline_parallel_degree", "expert_parallel_degree"):
        if getattr(parallelism, name, 1) != 1:
            raise ValueError(f"{own.model} has {name}={getattr(parallelism, name)}; the ranks of a comparison are tensor-parallel alone")
    training, dtype = given.training, {"bf16": "bfloat16", "fp32": "float32"}[run.dtype]
    if training.mixed_precision_param != dtype:
        raise ValueError(
            f"{own.model} has mixed_precision_param={training.mixed_precision_param}, and --dtype says {dtype}; take dtype, or say it"
        )
    batch = training.local_batch_size * run.micro_batches
    return replace(
        given,
        dump_folder=folder,
        training=replace(training, steps=run.steps, global_batch_size=batch, disable_cuda_graphs=True),
        parallelism=replace(
            parallelism, tensor_parallel_degree=run.tp, data_parallel_shard_degree=1, enable_sequence_parallel=run.sequence_parallel
        ),
        checkpoint=replace(given.checkpoint, enable=False),
        debug=replace(given.debug, seed=run.seed),
        override=OverrideConfig(imports=[(OVERRIDE, {"leaves": run.leaves})] if run.layers == "tpinv" else []),
    )


def parallelize_without_fsdp(model, *, parallel_dims, compile_config, ac_config=None, dump_folder="", **_):
    """Tensor parallelism alone: parameters, gradients and optimizer states in one dtype, as generators hold them (skip_dp)."""
    model.parallelize(parallel_dims)
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable:
        apply_compile(model, compile_config=compile_config, parallel_dims=parallel_dims)
    return model


class NoTokenizer(BaseTokenizer):
    """The text is bytes already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str):
        super().__init__()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def get_vocab_size(self) -> int:
        return 256


class TextDataLoader(BaseDataLoader):
    """Consecutive batches of real text, the same on every tensor-parallel rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, seq_len: int, local_batch_size: int, dp_rank: int, dp_world_size: int, **_):
        self.shape, self.dp_rank, self.dp_world_size = (local_batch_size, seq_len), dp_rank, dp_world_size

    def __iter__(self):
        text, size = real_text(), math.prod(self.shape)
        for start in range(self.dp_rank * size, len(text) - size, self.dp_world_size * size):
            tokens, labels = (text[start + shift : start + shift + size].view(self.shape) for shift in (0, 1))
            yield {"input": tokens}, labels

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        pass
