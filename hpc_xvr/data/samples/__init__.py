"""Samples for training and evaluation; the only part of `data` that imports torch."""
