"""Closed-form edits of projections: one solver, three builders of constraints."""
