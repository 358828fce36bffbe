"""Plots as SVG text with a text alternative, for reports and benchmarks: no library, and nothing is fetched."""
