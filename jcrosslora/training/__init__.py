"""LoRA training on examples: the loss on answers, optimisers, checkpoints to resume from."""

from jcrosslora.evaluate.examples import Example as Example
from jcrosslora.evaluate.examples import read_examples as read_examples
from jcrosslora.training.batches import Batch as Batch
from jcrosslora.training.batches import Plan as Plan
from jcrosslora.training.batches import encode as encode
from jcrosslora.training.batches import loss_and_gradient as loss_and_gradient
from jcrosslora.training.batches import make_batch as make_batch
from jcrosslora.training.checkpoints import TrainingSettings as TrainingSettings
from jcrosslora.training.run import fit_magnitudes as fit_magnitudes
from jcrosslora.training.run import save_trained as save_trained
from jcrosslora.training.run import train_lora as train_lora
from jcrosslora.training.start import first_factors as first_factors
