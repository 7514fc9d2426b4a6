"""What makes a step quick, in training and in drawing: fused operations, Triton kernels and CUDA graphs."""
