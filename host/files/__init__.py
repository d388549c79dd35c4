"""Files in ComfyUI's model folders."""
