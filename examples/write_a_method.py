r"""Write a transfer method of your own.

A method is a frozen dataclass. Its fields are its hyper-parameters: the flags of the command line, the keys of recipes
and of batch plans, and the keys of the cache follow from them. `maps` is the maths for one pair of modules, unbatched;
jcrosslora runs it over all layers at once. What it looks at is named in `requires`.

This one keeps what lies in the leading singular subspace of the target's outputs, and leaves the inputs as they are. It
is defined for modules of equal shape, so it moves adapters to a further-trained version of their base:

    python examples/write_a_method.py ADAPTER SOURCE TARGET

The command line takes it as MODULE:CLASS:

    cd examples
    jcrosslora transfer ADAPTER --source SOURCE --target TARGET --out moved \\
        --method write_a_method:OutputSubspace --svd-rank 64 --strength 0.8
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

import jcrosslora as jcl
from jcrosslora.linalg import low_rank, select


@jcl.register_method
@dataclass(frozen=True)
class OutputSubspace(jcl.MapMethod):
    """Keep the part of each update whose outputs lie in the target's leading left singular vectors."""

    name: ClassVar[str] = "output-subspace"
    summary: ClassVar[str] = "outputs projected on the target's left singular vectors, inputs as they are: U U' dW"
    reference: ClassVar[str] = "examples/write_a_method.py"
    requires: ClassVar[frozenset[jcl.EvidenceKind]] = frozenset({jcl.EvidenceKind.SINGULAR_VECTORS})
    equal_shapes: ClassVar[bool] = True

    svd_rank: int = 128
    """Truncation rank R of the SVDs. A module whose short side is smaller uses that."""
    strength: float = 1.0
    """Factor on the update."""

    def maps(self, evidence: jcl.Evidence) -> jcl.Maps:
        """Return P_out = strength U U' and P_in = I, for a target weight U S V' of shape (O, I)."""
        svd = evidence.tgt.svd
        assert svd is not None  # because of `requires`
        inputs = evidence.tgt.weight.shape[1]
        identity = select(jnp.arange(inputs), jnp.ones(inputs), inputs)
        return jcl.Maps(((low_rank(self.strength * svd.u, svd.u), identity),))


def main() -> None:
    """Parse the command line, and move an adapter by the method at two strengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="the adapter to move")
    parser.add_argument("source", help="the base it was trained on")
    parser.add_argument("target", help="a base with modules of the same shapes")
    arguments = parser.parse_args()
    for strength in (1.0, 0.5):
        method = OutputSubspace(svd_rank=16, strength=strength)
        result = jcl.transfer(arguments.adapter, arguments.source, arguments.target, method)
        print(f"strength {strength:g}: kept {result.report.kept:.1%} of the update; {result.verdict.text}")


if __name__ == "__main__":
    main()
