"""Work that several processes do together by `jax.distributed`."""
