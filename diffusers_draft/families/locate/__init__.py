"""Finds the video tokens from the arguments of a forward."""
