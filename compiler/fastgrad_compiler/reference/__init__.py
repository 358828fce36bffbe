"""What each operation means: on torch tensors, and in numpy for translation validation."""
