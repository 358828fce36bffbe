"""Checkpoints of other libraries: read as a spec and its weights, and written back."""
