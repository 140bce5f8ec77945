"""The demo: a small trained Wan pipeline that runs on a CPU, its procedural videos, and pictures of its blocks."""
