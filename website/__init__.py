"""The documentation as a static site: `make docs` (docs/architecture.md)."""
