"""LoRA training on examples: the loss of answers, AdamW, checkpoints to continue from."""

from jcrosslora.evaluate.examples import Example, read_examples
from jcrosslora.training.run import save_trained, train_lora
from jcrosslora.training.settings import TrainingSettings

__all__ = ["Example", "TrainingSettings", "read_examples", "save_trained", "train_lora"]
