"""Words, prompts and templates."""
