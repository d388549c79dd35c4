"""Prompts through ComfyUI's text encoders."""
