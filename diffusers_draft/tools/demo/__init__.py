"""The embedded demo: a small Wan pipeline that runs anywhere, and pictures of what draft attention did in it."""
