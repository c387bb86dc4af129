"""LoRA training on examples: the loss of answers, optimisers, checkpoints to continue from."""

from jcrosslora.evaluate.examples import Example, read_examples
from jcrosslora.training.batches import Batch, Plan, encode, loss_and_gradient, make_batch
from jcrosslora.training.checkpoints import TrainingSettings
from jcrosslora.training.run import fit_magnitudes, save_trained, train_lora
from jcrosslora.training.start import first_factors

__all__ = [
    "Batch",
    "Example",
    "Plan",
    "TrainingSettings",
    "encode",
    "first_factors",
    "fit_magnitudes",
    "loss_and_gradient",
    "make_batch",
    "read_examples",
    "save_trained",
    "train_lora",
]
