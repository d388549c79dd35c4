"""A concept: the value, its file, what it says about itself."""
