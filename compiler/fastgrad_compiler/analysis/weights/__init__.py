"""Ranges of logits that the weights of a model prove."""
