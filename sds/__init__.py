"""A scene learns from a frozen diffusion model: score distillation."""
