"""Forward pass, sampling and likelihoods of the supported families in JAX, as pure functions over stacked weights."""

from jcrosslora.decoder.adapters import AppliedAdapter as AppliedAdapter
from jcrosslora.decoder.adapters import StackedAdapter as StackedAdapter
from jcrosslora.decoder.adapters import StackedFactors as StackedFactors
from jcrosslora.decoder.adapters import join_stacked as join_stacked
from jcrosslora.decoder.adapters import stack_adapter as stack_adapter
from jcrosslora.decoder.adapters import stack_adapters as stack_adapters
from jcrosslora.decoder.adapters import unstack_adapter as unstack_adapter
from jcrosslora.decoder.attention import KVCache as KVCache
from jcrosslora.decoder.attention import init_cache as init_cache
from jcrosslora.decoder.forward import CAPTURES as CAPTURES
from jcrosslora.decoder.forward import Output as Output
from jcrosslora.decoder.forward import forward as forward
from jcrosslora.decoder.forward import logits as logits
from jcrosslora.decoder.generate import Generator as Generator
from jcrosslora.decoder.generate import Written as Written
from jcrosslora.decoder.layer import INPUT_SITES as INPUT_SITES
from jcrosslora.decoder.layer import LayerCapture as LayerCapture
from jcrosslora.decoder.log_probs import target_log_probs as target_log_probs
from jcrosslora.decoder.params import Params as Params
from jcrosslora.decoder.params import fast_dtype as fast_dtype
from jcrosslora.decoder.params import load_params as load_params
from jcrosslora.decoder.settings import DecoderSettings as DecoderSettings
from jcrosslora.decoder.settings import settings_of as settings_of
