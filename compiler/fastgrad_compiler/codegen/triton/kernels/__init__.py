"""The text of Triton kernels: its parts, which the emitter puts one after another, after the constants."""
