"""Trains the demo's model: a small Wan pipeline that makes the procedural videos of `diffusers_draft.demo.scenes`."""
