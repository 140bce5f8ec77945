"""Attention processors that are written out, because stock ones waste what sparsity saves."""
