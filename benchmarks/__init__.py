"""Figures, each measured side by side in one run: `python dev.py bench <name>`."""
