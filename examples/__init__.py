"""Examples that use the library and are not part of its package."""
