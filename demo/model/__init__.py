"""The small world's model, built of ComfyUI's own classes."""
