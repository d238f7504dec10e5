"""gradient_accumulation_fusion without Apex: what Megatron-Core's own linears ask for when they are built.

Their constructor raises unless Apex's extension ``fused_weight_gradient_mlp_cuda`` can be imported, with TransformerEngine too: the output
layer is Megatron's own in every spec. A converted linear never calls it. So that such a model can be built and converted, Megatron gets two
functions that do what Apex's do, for the case that a model stays stock: TransformerEngine's product into main_grad, or else torch's.
"""

import logging
import types

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from tpinv.integrations.megatron import te

logger = logging.getLogger("tpinv")


def accumulate(x: Tensor, dy: Tensor, main_grad: Tensor) -> None:
    """main_grad [N, K] += dy^T x of x [..., K] and dy [..., N], not rounded to their dtype where main_grad is float32."""
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if te.INSTALLED and x.is_cuda:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        general_gemm(x, dy, out_dtype=main_grad.dtype, layout="NT", grad=True, accumulate=True, out=main_grad)
    elif x.dtype == main_grad.dtype:
        main_grad.addmm_(dy.t(), x)
    elif x.is_cuda:
        main_grad.add_(torch.mm(dy.t(), x, out_dtype=main_grad.dtype))
    else:
        main_grad.add_(dy.to(main_grad.dtype).t() @ x.to(main_grad.dtype))


def install() -> None:
    """Once per process, where Apex's extension is missing. Importing tpinv.integrations.megatron calls it."""
    if layers._grad_accum_fusion_available:
        return
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)
    layers._grad_accum_fusion_available = True
    logger.info("gradient_accumulation_fusion without Apex: layers that are not converted use %s", accumulate.__qualname__)
