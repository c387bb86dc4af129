"""LoRA training: the loss of answers, AdamW, checkpoints to go on from."""

from jcrosslora.training.examples import Prompted, read_examples
from jcrosslora.training.run import train_lora
from jcrosslora.training.settings import TrainSettings

__all__ = ["Prompted", "TrainSettings", "read_examples", "train_lora"]
