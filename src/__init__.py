"""Towline: a few YAML choices become a fine-tune that is tracked, resumable and comparable."""
