"""Tools around the plug-in: generation, evaluation, benchmarks and the demo."""
