"""Closed-form edits on a ComfyUI model."""
