"""Networks: torch in, torch out. No config, no files, no ranks."""
