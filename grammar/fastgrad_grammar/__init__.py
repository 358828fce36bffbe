"""The `.tfg` language: sources, parser, diagnostics, formatter and the standard library."""
