"""What models of each form of attention learn: recall, in-context learning, copying, language (docs/quality.md)."""
