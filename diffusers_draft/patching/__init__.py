"""The plug-in: puts the method into a diffusers model and takes it out again."""
