"""Distillation: fit an update of the target, in closed form, to the predictions of the source with its adapter."""
