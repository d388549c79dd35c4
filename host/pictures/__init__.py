"""Pictures and masks, brought to what a model takes."""
