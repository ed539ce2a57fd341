"""The trainer: the one place where model, data and dist meet."""
