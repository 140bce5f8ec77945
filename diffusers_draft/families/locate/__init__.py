"""Helpers that locate the video tokens from the arguments of a forward."""
