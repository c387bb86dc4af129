"""Fits of an update: to predictions (distill), to the residual stream, and to the difference of two bases' weights."""
