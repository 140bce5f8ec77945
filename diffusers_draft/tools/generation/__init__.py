"""Generation with any supported diffusers pipeline: loading, running, writing video files."""
