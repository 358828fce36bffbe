"""Conversion of softmax attention to attention in linear time: a changed spec, attention transfer, tuning."""
