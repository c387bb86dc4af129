"""Two CPU devices, strict dtype and rank promotion: what a user's machine may do must not slip through here."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
