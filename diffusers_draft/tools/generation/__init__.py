"""Videos from any diffusers pipeline that draft attention knows: loading, running, writing files."""
