"""Emitters: one per target, from a program or a specification to source text."""
