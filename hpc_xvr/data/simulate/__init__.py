"""Simulated experiments recorded by two cameras, and whole corpora of them."""
