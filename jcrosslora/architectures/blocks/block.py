"""What a block of a layer is: its linear modules, norms and other tensors, what it keeps of a text, and how it runs."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import jax

from jcrosslora.architectures.cache import KVCache
from jcrosslora.architectures.run import Run


class Linear(NamedTuple):
    """A linear module that blocks of a class may have.

    Attributes:
        role: its name in `--roles`, in reports and among stacked weights; one role has one shape in a model.
        path: its logical name in a layer, the same in every family.
        site: names what it reads. Modules of one site read the same array, and are in the same layers.
        norm: place of the norm between it and the residual stream; None if there is none.
        gguf: its name in a layer of a GGUF file; None if it has none.
        stream: whether it reads the residual stream, writes to it, or does neither.
    """

    role: str
    path: str
    site: str
    norm: str | None
    gguf: str | None = None
    stream: Literal["reads", "writes", "inside"] = "reads"


class Norm(NamedTuple):
    """A norm inside a block: its name in `Family.norms`, and how many features it normalises."""

    name: str
    size: int


class Tensor(NamedTuple):
    """A tensor that is neither a linear module nor a norm.

    Attributes:
        path: its name in a layer, e.g. "self_attn.sinks".
        shape: of the tensor.
        exact: whether it is float32 in every forward pass, instead of the dtype of the weights.
    """

    path: str
    shape: tuple[int, ...]
    exact: bool = True


class Block:
    """A block of a layer. Subclasses are frozen dataclasses whose fields are sizes and choices, static under jit."""

    # What blocks of this class may have, whatever their fields: linear modules, and GGUF names by place of a norm.
    LINEARS: ClassVar[tuple[Linear, ...]] = ()
    GGUF_NORMS: ClassVar[Mapping[str, str]] = {}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return role -> (O, I) of the linear modules of this block."""
        return {}

    def norms(self) -> dict[str, Norm]:
        """Return place -> norm, of the norms that this block has where the family names them."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return name -> tensor, of the others but those of experts."""
        return {}

    @cached_property
    def names(self) -> frozenset[str]:
        """The roles, places of norms, and names of tensors of this block."""
        return frozenset({*self.shapes(), *self.norms(), *self.tensors()})

    @property
    def shared_kind(self) -> str | None:
        """The kind of a state of a layer before that this block reads, None if it reads none."""
        return None

    @property
    def rotated_size(self) -> int | None:
        """Features of a head that may have positions; None for a block without positions."""
        return None

    @property
    def mixed_size(self) -> int:
        """Features of a token that the block mixes with those of others; 0 for a block that mixes none."""
        return 0

    def states(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        """Return the form of what the block keeps of B texts of up to S tokens: kind -> `ShapeDtypeStruct` (B, ...)."""
        del batch, length, dtype
        return {}

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run the block on the normed stream x (B, T, H).

        Returns:
            (B, T, H), what it adds to the stream, and the cache with what it keeps of these tokens.
        """
        raise NotImplementedError
