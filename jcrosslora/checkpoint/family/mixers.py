"""What mixes the tokens in layers without attention, or beside it: its sizes, modules and tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MixerKind = Literal["convolution", "delta", "mamba"]

# The module of a layer that holds each kind of mixer.
_HOLDERS: Mapping[MixerKind, str] = {"convolution": "conv", "delta": "linear_attn", "mamba": "mamba"}


@dataclass(frozen=True)
class Mixer:
    """The mixer of a model beside attention, with its sizes.

    Attributes:
        kind: a short convolution (LFM2), the gated delta rule (Qwen3.5), or a state-space model (Mamba 2).
        hidden: width of the residual stream.
        taps: K, tokens that the convolution sees, its own included.
        heads: H, heads of values, each with a state (N, P); 0 for a short convolution, as the next three.
        groups: G, heads of queries and keys; consecutive H / G heads of values share one.
        key_size: N, features of a query or key.
        value_size: P, features of a value.
        conv_bias: whether the convolution has a bias.
        norm: place of the output's norm, which "mamba" has for each of `groups` and "delta" for each head; None if
            there is only a gate.
        grouped: whether "delta" has two modules in front, with rows sorted by group: queries, keys, values and gates of
            each in one, the two numbers of each head of values in the other. Else there are four, or six.
        separate: whether "delta" has modules of their own for queries, keys and values.
        beta_limit: what the rate at which "delta" writes lies below; above 1 the state may change its sign.
        eps: added to the mean square in its norm; None for that of the model.
        step_limits: bounds of the time step of "mamba".
        open_output: whether the last module of "mamba" can have an update. PEFT refuses that of some classes, for which
            it is a tensor among others.
        output_bias: whether that module has a bias, where it cannot.
        activation: behind the convolution of "mamba"; None for that of the model.
        holder: module of a layer that holds it; None for the usual one.
        factors: on gate, values, keys, queries and time steps of "mamba"; empty if there are none.
    """

    kind: MixerKind
    hidden: int
    taps: int
    heads: int = 0
    groups: int = 0
    key_size: int = 0
    value_size: int = 0
    conv_bias: bool = False
    norm: Literal["before the gate", "behind the gate"] | None = None
    grouped: bool = False
    separate: bool = False
    beta_limit: float = 1.0
    eps: float | None = None
    step_limits: tuple[float, float] = (0.0, float("inf"))
    activation: str | None = None
    holder: str | None = None
    factors: tuple[float, ...] = ()
    open_output: bool = True
    output_bias: bool = False

    @property
    def inner(self) -> int:
        """Features of the values of all heads."""
        return self.heads * self.value_size

    @property
    def convolved(self) -> int:
        """C, features that the convolution takes."""
        return self.hidden if self.kind == "convolution" else self.inner + 2 * self.groups * self.key_size

    def role_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape (O, I) of each role."""
        match self.kind:
            case "convolution":
                return {"conv_in_proj": (3 * self.hidden, self.hidden), "conv_out_proj": (self.hidden, self.hidden)}
            case "delta" if self.grouped:
                return {
                    "in_proj_qkvz": (self.convolved + self.inner, self.hidden),
                    "in_proj_ba": (2 * self.heads, self.hidden),
                    "delta_out_proj": (self.hidden, self.inner),
                }
            case "delta":
                keys = (self.groups * self.key_size, self.hidden)
                parts = {"delta_q_proj": keys, "delta_k_proj": keys, "delta_v_proj": (self.inner, self.hidden)}
                return {
                    **(parts if self.separate else {"in_proj_qkv": (self.convolved, self.hidden)}),
                    "in_proj_z": (self.inner, self.hidden),
                    "in_proj_b": (self.heads, self.hidden),
                    "in_proj_a": (self.heads, self.hidden),
                    "delta_out_proj": (self.hidden, self.inner),
                }
            case "mamba":
                rows = self.inner + self.convolved + self.heads
                found = {"mamba_in_proj": (rows, self.hidden)}
                return found | ({"mamba_out_proj": (self.hidden, self.inner)} if self.open_output else {})

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the tensors beside the modules of `role_shapes`: name -> (path in a layer, shape)."""
        holder = self.holder or _HOLDERS[self.kind]
        conv = f"{holder}.{'conv' if self.kind == 'convolution' else 'conv1d'}"
        found: dict[str, tuple[str, tuple[int, ...]]] = {"conv": (f"{conv}.weight", (self.convolved, 1, self.taps))}
        if self.conv_bias:
            found["conv_bias"] = (f"{conv}.bias", (self.convolved,))
        if self.heads:
            found |= {name: (f"{holder}.{name}", (self.heads,)) for name in ("A_log", "dt_bias")}
        if self.kind == "mamba":
            found["D"] = (f"{holder}.D", (self.heads,))
        if not self.open_output:
            found["mamba_out_proj"] = (f"{holder}.out_proj.weight", (self.hidden, self.inner))
            if self.output_bias:
                found["mamba_out_bias"] = (f"{holder}.out_proj.bias", (self.hidden,))
        if self.norm is not None:
            size = self.value_size if self.kind == "delta" else self.inner
            found["norm"] = (f"{holder}.{'o_norm' if self.separate else 'norm'}.weight", (size,))
        return found


def mamba_tensors(holder: str) -> dict[str, str]:
    """Return the names of the tensors of Mamba 2 in GGUF -> those in a layer, given the module that holds it."""
    names = {"ssm_a": "A_log", "ssm_d": "D", "ssm_dt.bias": "dt_bias", "ssm_norm.weight": "norm.weight"}
    names |= {f"ssm_conv1d.{kind}": f"conv1d.{kind}" for kind in ("weight", "bias")}
    return {stored: f"{holder}.{name}" for stored, name in names.items()}
