"""Distillation: fit an update of the target to the predictions of the source with its adapter."""
