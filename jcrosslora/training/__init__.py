"""LoRA training on examples: the loss of answers, optimisers, checkpoints to continue from."""

from jcrosslora.evaluate.examples import Example, read_examples
from jcrosslora.training.magnitudes import fit_magnitudes
from jcrosslora.training.run import save_trained, train_lora
from jcrosslora.training.settings import TrainingSettings

__all__ = ["Example", "TrainingSettings", "fit_magnitudes", "read_examples", "save_trained", "train_lora"]
