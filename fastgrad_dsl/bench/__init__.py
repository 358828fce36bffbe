"""Measuring attention on this machine: time, memory and the share of its arithmetic peak (docs/benchmark.md)."""
