"""The small world: a procedural renderer, captions, a small text-to-image model and its trainer."""
