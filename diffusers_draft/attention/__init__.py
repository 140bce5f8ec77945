"""The method: draft attention on torch alone."""
