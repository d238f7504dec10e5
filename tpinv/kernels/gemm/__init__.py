"""Products: one problem, two kernels (Triton everywhere, csrc/sm90_tree_gemm.cu on Hopper), a tuner that admits verified bits only."""
