"""Align two bases with several processes by `jax.distributed`."""
