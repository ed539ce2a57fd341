"""Comparison of methods on recordings whose truth is known, and the report of a run."""
