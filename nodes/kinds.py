"""The pack's own socket types."""

from __future__ import annotations

from comfy_api.latest import io

ConceptKind = io.Custom("PERFUSION_CONCEPT")
PreserveKind = io.Custom("PERFUSION_PRESERVE")
CovarianceKind = io.Custom("PERFUSION_COVARIANCE")
# What ComfyUI's own Plot Loss Graph node takes.
LossMapKind = io.Custom("LOSS_MAP")
TrainingOptionsKind = io.Custom("PERFUSION_TRAINING_OPTIONS")
