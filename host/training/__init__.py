"""Training inside of a prompt."""
