"""Draft attention over several GPUs (Ulysses): ranks exchange tokens for heads and back."""
