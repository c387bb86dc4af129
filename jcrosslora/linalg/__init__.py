"""Linear algebra without models: decompositions, factored maps, least squares.

Functions take one matrix; callers add `jax.vmap` and `jax.jit`.
"""

from jcrosslora.linalg.host import map_on_host as map_on_host
from jcrosslora.linalg.host import stack_rows as stack_rows
from jcrosslora.linalg.low_rank import LinearMap as LinearMap
from jcrosslora.linalg.low_rank import array_module as array_module
from jcrosslora.linalg.low_rank import complement as complement
from jcrosslora.linalg.low_rank import cosine as cosine
from jcrosslora.linalg.low_rank import dot as dot
from jcrosslora.linalg.low_rank import low_rank as low_rank
from jcrosslora.linalg.low_rank import procrustes as procrustes
from jcrosslora.linalg.low_rank import product_energy as product_energy
from jcrosslora.linalg.low_rank import psd_power as psd_power
from jcrosslora.linalg.low_rank import select as select
from jcrosslora.linalg.svd import choose_kernel as choose_kernel
from jcrosslora.linalg.svd import decompose as decompose
from jcrosslora.linalg.svd import describe_kernels as describe_kernels
from jcrosslora.linalg.svd import mesh_of as mesh_of
from jcrosslora.linalg.svd import over_layers as over_layers
from jcrosslora.linalg.svd import shard as shard
from jcrosslora.linalg.svd import to_device as to_device
from jcrosslora.linalg.svd_float64 import refine as refine
from jcrosslora.linalg.svd_kernels import TruncatedSVD as TruncatedSVD
from jcrosslora.linalg.svd_kernels import full_svd as full_svd
from jcrosslora.linalg.svd_kernels import gram_svd as gram_svd
from jcrosslora.linalg.svd_kernels import krylov_svd as krylov_svd
