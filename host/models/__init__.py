"""What is known of ComfyUI's models: families, blocks, losses."""
