"""What several test modules use and is no fixture; pytest finds it by `pythonpath` in
pyproject.toml."""
