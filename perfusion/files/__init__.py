"""Safetensors from strangers in, whole files out."""
