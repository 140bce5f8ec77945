"""Attention processors that replace stock ones which are too slow for sparse attention to pay."""
