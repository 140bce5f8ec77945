"""What can be done with the library and is not part of it."""
