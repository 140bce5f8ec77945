"""Train the demo's model: a small Wan pipeline that makes the drawn videos of `diffusers_draft.tools.demo.scenes`."""
