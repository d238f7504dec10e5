"""Apex's weight gradient added to main_grad: the float32 product, not rounded."""


def wgrad_gemm_accum_fp32(input, d_output, main_grad):
    main_grad.add_(d_output.flatten(0, -2).float().t() @ input.flatten(0, -2).float())


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
