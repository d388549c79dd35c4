"""The method as `nn.Module`s for research code."""
