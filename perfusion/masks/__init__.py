"""From attention maps to soft masks."""
