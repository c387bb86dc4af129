"""The experts of a family: their sizes, router and tensor names, and the layers that have them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jcrosslora.architectures.blocks import Experts, Routing, Scores
from jcrosslora.architectures.config import Number, number_keys, read_number, refuse, size
from jcrosslora.errors import CheckpointError

_ONE_EACH = {name: f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")}
_FUSED = {"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}

# Tensor names of a layer's experts in the two usual layouts: one matrix per expert (published files; "{}" is the number
# of the expert), or one matrix for all experts (in memory, by transformers 5).
PUBLISHED = {"router": "mlp.gate.weight", **_ONE_EACH}
FUSED = {"router": "mlp.gate.weight", **_FUSED}
# One matrix for all experts, separate for gate, up and down, as in GGUF.
MERGED = {"router": "mlp.gate.weight"} | {name: path.replace(".{}", "") for name, path in _ONE_EACH.items()}
CORRECTION = {"correction": "mlp.gate.e_score_correction_bias"}
BIASES = {f"{name}_bias": path.replace(".{}", "")[:-6] + "bias" for name, path in _ONE_EACH.items()}


def layouts_with(added: dict[str, str], in_memory: dict[str, str] | None = None) -> tuple[dict[str, str], ...]:
    """Return the usual layouts with `added` names, which replace or extend theirs; `in_memory` ones may differ."""
    return PUBLISHED | added, MERGED | added, FUSED | (added if in_memory is None else in_memory)


# (configuration, number of layers) -> whether each layer has experts.
SparseRule = Callable[[Mapping[str, Any], int], Sequence[bool]]


def in_all_layers(_config: Mapping[str, Any], layers: int) -> list[bool]:
    """Give all layers experts."""
    return [True] * layers


@dataclass(frozen=True)
class ExpertRules:
    """How a family configures and names its experts: E experts of width I, hidden size H.

    Fields that `Experts` and `Routing` have too are the same for all models of the family.

    Attributes:
        count: configuration keys of E; the first that is stated counts.
        used: configuration key of the number of experts per token.
        width: configuration key of I.
        layouts: possible tensor names of a layer, the published layout first, the class's in memory last. Each maps a
            name to a name in a layer: "router" (E, H), "router_bias" (E,), "correction" (E,), added to the scores for
            the choice of experts, "gate", "up" (I, H) and "down" (H, I) of one expert, or of all with a first axis E,
            "gate_up" (E, 2 I, H) and "down" (E, H, I) of all, "gate_up_bias" (E, 2 I), or "gate_bias" and "up_bias"
            (E, I), "down_bias" (E, H).
        scores_key: configuration key of the scores; None if all models have the same.
        scores_names: value of that key -> scores.
        normalised: see `Routing`; or the configuration key for it.
        averaged: configuration key, and its value that sets `Experts.averaged`.
        groups: configuration keys of the number of groups of experts, and of the number of groups a token may use.
        transposed: names in a layer of matrices of all experts that are stored as (E, I, O).
        stores_transposes: whether PEFT's files hold factors of the transposed matrices. PEFT mistakes I for O where a
            class stores (E, I, O) without an attribute that says so.
        gated: whether experts have a gate; if not, "gate_up" is (E, I, H) and holds only "up".
        latent: configuration key of `Experts.latent`; None if no model has one.
        interleaved: whether rows of gate and up alternate in "gate_up" and "gate_up_bias".
        correction_axes: number of axes of the stored "correction"; 2 for (1, E).
        layers: returns which layers have experts.
        shared: returns the width of the shared experts from a configuration; 0 without any.
        clamp: alpha and the limit of gate and up in the activation gate * sigmoid(alpha gate) * (up + 1).
    """

    count: tuple[str, ...]
    used: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    layouts: tuple[Mapping[str, str], ...] = (PUBLISHED, MERGED, FUSED)
    scores: Scores = "softmax"
    scores_key: str | None = None
    scores_names: Mapping[str, Scores] = field(default_factory=dict)
    normalised: bool | str = True
    sum_eps: float = 1e-20
    tolerance: Number | None = None
    scale: Number | None = None
    scaled_inputs: bool = False
    averaged: tuple[str, str] | None = None
    groups: tuple[str, str] | None = None
    group_best: int = 2
    transposed: frozenset[str] = frozenset()
    stores_transposes: bool = False
    gated: bool = True
    latent: str | None = None
    interleaved: bool = False
    correction_axes: int = 1
    layers: SparseRule = in_all_layers
    shared: Callable[[Mapping[str, Any]], int] = lambda _: 0
    shared_gate: bool = False
    clamp: tuple[Number, Number] | None = None

    @property
    def keys(self) -> set[str]:
        """The configuration keys that these rules read, and keys that only matter when experts are trained."""
        one = (self.used, self.width, self.scores_key, self.normalised, self.latent)
        stated = {key for key in one if isinstance(key, str)} | {*self.count, *(self.groups or ()), *number_keys(self)}
        return stated | {"output_router_logits", "router_aux_loss_coef"}

    def scores_of(self, config: Mapping[str, Any]) -> Scores:
        """Return how a model scores its experts.

        Raises CheckpointError if the configuration states scores that `scores_names` does not have.
        """
        stated = None if self.scores_key is None else config.get(self.scores_key)
        if stated is None:
            return self.scores
        if not isinstance(stated, str) or stated not in self.scores_names:
            refuse(str(self.scores_key), stated, " or ".join(map(repr, self.scores_names)))
        return self.scores_names[stated]

    def block(self, config: Mapping[str, Any], hidden: int) -> Experts:
        """Return the experts of a model; raise CheckpointError if a size or a number is missing or out of range."""
        count_key = next((key for key in self.count if config.get(key) is not None), self.count[0])
        count, used, width = (size(config, key) for key in (count_key, self.used, self.width))
        groups, used_groups = (1, 1) if self.groups is None else (size(config, key, 1) for key in self.groups)
        if used > count or used_groups > groups or count % groups or used > count // groups * used_groups:
            msg = f"{self.used} {used} of {count} experts in {groups} groups, {used_groups} of them used, is no choice"
            raise CheckpointError(msg)
        clamp, normalised = self.clamp, self.normalised
        routing = Routing(
            count=count,
            used=used,
            scores=self.scores_of(config),
            normalised=bool(config.get(normalised)) if isinstance(normalised, str) else normalised,
            sum_eps=self.sum_eps,
            tolerance=None if self.tolerance is None else read_number(config, self.tolerance),
            scale=1.0 if self.scale is None else read_number(config, self.scale),
            scaled_inputs=self.scaled_inputs,
            groups=groups,
            used_groups=used_groups,
            group_best=self.group_best,
        )
        return Experts(
            hidden,
            width,
            routing,
            tuple(self.layouts[-1]),
            gated=self.gated,
            clamp=clamp and (read_number(config, clamp[0]), read_number(config, clamp[1])),
            latent=None if self.latent is None or config.get(self.latent) is None else size(config, self.latent),
            shared=self.shared(config),
            shared_gate=self.shared_gate,
            averaged=self.averages(config),
        )

    def averages(self, config: Mapping[str, Any]) -> bool:
        """Whether the outputs of routed and shared experts are averaged instead of added."""
        return self.averaged is not None and config.get(self.averaged[0]) == self.averaged[1]


def shared_width(count: str | None = None) -> Callable[[Mapping[str, Any]], int]:
    """Return a rule for shared experts: the width of one expert times the number at `count` (1 without it)."""

    def width(config: Mapping[str, Any]) -> int:
        return (1 if count is None else size(config, count)) * size(config, "moe_intermediate_size")

    return width


def by_step(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Give each `decoder_sparse_step`-th layer experts, but none of `mlp_only_layers`."""
    step, dense = size(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple):
        refuse("mlp_only_layers", dense, "a list of layers")
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]


def by_list(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Give experts to the layers that `mlp_layer_types` names "sparse"."""
    stated, names = config.get("mlp_layer_types"), {"dense", "sparse"}
    if not isinstance(stated, list | tuple) or len(stated) != layers or not set(map(str, stated)) <= names:
        refuse("mlp_layer_types", stated, f"dense or sparse for each of {layers} layers")
    return [kind == "sparse" for kind in stated]


def behind_first(key: str) -> SparseRule:
    """Return a rule that gives experts to all layers but the first ones, counted by a configuration key."""

    def sparse(config: Mapping[str, Any], layers: int) -> list[bool]:
        first = config.get(key)
        if type(first) is not int or first < 0:
            refuse(key, first, "the number of layers without experts")
        return [layer >= first for layer in range(layers)]

    return sparse
