"""Compile a `.tfg` description of a transformer to a PyTorch module with almost-linear attention."""
