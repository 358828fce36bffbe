"""The `.tfg` language: sources, positions, the parser, diagnostics, the formatter and the standard library."""
