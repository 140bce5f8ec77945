"""Tools for users: generate, evaluate, measure speed, and the demo."""
