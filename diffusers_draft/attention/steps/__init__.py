"""The steps around the kernel: plain torch, and fused in Triton for GPUs."""
