"""Calibration: what the logits, the errors of candidates and the gains of a model's attentions are on real data."""
