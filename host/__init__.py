"""The only part of the pack that touches ComfyUI's internals."""
