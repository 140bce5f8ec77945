"""Benchmarks of one attention call and of one denoising step, as ratios to dense attention in the same run."""
