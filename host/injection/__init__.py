"""Concepts inside a loaded model."""
