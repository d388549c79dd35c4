"""Learning a concept from pictures."""
