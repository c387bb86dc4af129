"""The interface of a kind of adapter: how to recognise it, and how to read its updates from a file."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.config import Config, check_lora
from jcrosslora.adapter.contents import PeftView, as_adapter_errors
from jcrosslora.adapter.names import TensorName
from jcrosslora.adapter.records import AdapterInfo
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.wrapped import TEXT, prefix_of, text_module_name
from jcrosslora.errors import AdapterError, JCrossLoRAError

T = TypeVar("T")
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("U8", "I16", "I32", "I64")
LARGEST = 2**28  # numbers in the factors of one module: 2 GB in float64
_HEAD = "lm_head"
# Parts whose names in files differ from those used here.
_TENSORS = {"A": "lora_A", "B": "lora_B", "dora": "lora_magnitude_vector", "latent": "default_lora_latent_mapping"}


@dataclass(frozen=True, eq=False)
class ParsedAdapter:
    """An opened adapter of a known kind: configuration checked, tensors grouped, updates not read yet.

    In several methods `needs` says, for messages, why the base is needed ("DoRA rescales the rows of W + B A").

    Attributes:
        origin: the provenance that is known before its tensors are read.
        modules: maps each module, as the file spells it and in natural order, to its parts (see `parse_tensor_name`)
            and these to tensor names in the file.
        others: the same for the output head, which is read separately but may determine what all modules share.
        shared: maps parts that all modules share to tensor names.
        extras: tensors outside the updates of the text model's linear layers, by kind (a key of `records.CHANGES`).
        base: the model that it was trained on.
        rank: the largest rank to read an update at.
    """

    kind: "Kind"
    origin: AdapterInfo
    stored: PeftView
    modules: Mapping[str, Mapping[str, str]]
    others: Mapping[str, Mapping[str, str]]
    shared: Mapping[str, str]
    extras: Mapping[str, Sequence[TensorName]]
    base: BaseModel | None
    rank: int | None

    @property
    def config(self) -> Config:
        """Its `adapter_config.json`, or the equivalent of PEFT."""
        return self.stored.config

    @property
    def path(self) -> Path:
        """The weights file, or its name in memory, for messages."""
        return self.stored.path

    def part(self, module: str, part: str, *, axes: int = 2) -> np.ndarray:
        """Read a float tensor of a module, see `read`; raises an AdapterError if the module lacks it."""
        if part not in self.modules[module]:
            msg = f"{self.path}: module {module!r} has no {_TENSORS.get(part, part)}: the file is incomplete; save or "
            raise AdapterError(msg + "download it again")
        return self.read(self.modules[module][part], axes=axes)

    def common(self, part: str, *, axes: int = 2) -> np.ndarray:
        """Read a float tensor that all modules share, see `read`; raises an AdapterError if the file lacks it."""
        if part not in self.shared:
            msg = f"{self.path}: there is no {part}, which all modules share: save or download the adapter again"
            raise AdapterError(msg)
        return self.read(self.shared[part], axes=axes)

    def read(self, key: str, *, axes: int = 2, dtypes: tuple[str, ...] = FLOATS) -> np.ndarray:
        """Copy a tensor into memory, C-contiguous; raises an AdapterError for an empty axis or non-finite values."""
        entry = self.stored.entries[key]
        if entry.dtype not in dtypes:
            msg = f"{self.path}: tensor {key!r} has dtype {entry.dtype}, expected one of {', '.join(dtypes)}: "
            raise AdapterError(msg + "convert it")
        if len(entry.shape) != axes or 0 in entry.shape:
            wanted = {1: "a vector", 2: "a matrix"}.get(axes, f"an array of {axes} axes")
            msg = f"{self.path}: tensor {key!r} has shape {list(entry.shape)}, expected {wanted}"
            raise AdapterError(msg + ": adapters of other layers than linear ones are not supported")
        with as_adapter_errors():
            array = np.array(self.stored.array(key), order="C")
        if not np.isfinite(array).all():
            msg = f"{self.path}: tensor {key!r} holds NaN or infinite values: the adapter is damaged, use another "
            raise AdapterError(msg + "checkpoint")
        return array

    def check_size(self, module: str, numbers: int, *, whole: bool = False) -> None:
        """Refuse factors of more than 2 GB, before they are computed: they are far larger than the stored tensors.

        `whole` says that they are computed at full rank in any case.
        """
        if numbers > LARGEST:
            lower = "" if whole else "read it at a lower rank (--adapter-rank), or "
            msg = f"{self.path}: the factors of module {module!r} would hold {numbers:,} numbers: {lower}use another "
            raise AdapterError(msg + "adapter if no base has such a module")

    def known_base(self, needs: str) -> BaseModel:
        """Return the base, or raise an AdapterError that says why it is needed."""
        if self.base is None:
            msg = f"{self.path}: {needs}: the source base is needed; give the base that it was trained on "
            raise AdapterError(msg + "(`inspect --base`, or the base argument of load_adapter)")
        return self.base

    def shape(self, module: str, needs: str) -> tuple[int, int]:
        """Return (O, I) of a module of the base; raises an AdapterError without a base or such a module."""
        base, name = self.known_base(needs), text_module_name(module)
        if name in base.modules:
            return base.modules[name].shape
        if name == _HEAD:
            return base.dims.vocab, base.dims.hidden
        if name in base.fused:
            parts = base.fused[name]
            return max(stop for _, _, stop in parts), base.modules[parts[0][0]].shape[1]
        msg = f"{self.path}: module {name!r} is not one of the base {base.name}: give the base it was trained on"
        raise AdapterError(msg)

    def check_shape(self, module: str, shape: tuple[int, int], needs: str) -> None:
        """Refuse an update of shape (O, I) that does not fit the base's module, see `shape`."""
        base, wanted = self.known_base(needs), self.shape(module, needs)
        if wanted != shape:
            msg = f"{self.path}: the update of {text_module_name(module)!r} is {shape[0]} x {shape[1]}, in the base "
            msg += f"{base.name} it is {wanted[0]} x {wanted[1]}: give the base it was trained on"
            raise AdapterError(msg)

    def weight(self, module: str, shape: tuple[int, int], needs: str) -> np.ndarray:
        """Return the base's weight of a module, float32 (O, I); see `check_shape`."""
        self.check_shape(module, shape, needs)
        with as_adapter_errors():
            return np.array(self.known_base(needs).stored_weight(text_module_name(module)), np.float32)

    def info(self, **known: Any) -> AdapterInfo:
        """Return the provenance with these facts about the adapter."""
        base_name = self.config.get("base_model_name_or_path")
        return replace(
            self.origin,
            base_name=base_name if isinstance(base_name, str) and base_name else None,
            base_digest=self.stored.base_digest,
            digest=f"sha256:{self.stored.sha256()}",
            kind=self.kind.name,
            prefix=next((found for module in self.modules if (found := prefix_of(module)) != TEXT), TEXT),
            **known,
        )

    def by_text_name(self, found: Iterable[tuple[str, T]]) -> dict[str, T]:
        """Key each module's value by its name in text-only models; raises an AdapterError if a name occurs twice."""
        named: dict[str, T] = {}
        for module, value in found:
            name = text_module_name(module)
            if name in named:
                raise AdapterError(f"{self.path}: module {name!r} occurs under two spellings: remove one of them")
            named[name] = value
        return named

    def check_not_empty(self, updates: Collection[object], ignored: Sequence[str]) -> None:
        """Refuse an adapter without usable updates; the message says what there is instead."""
        if not updates:
            found = "; ".join(sentence.rstrip(".") for sentence in ignored) or "it is empty"
            msg = f"{self.path}: holds no {self.kind.name} of a linear layer ({found}): nothing can be moved"
            hint = "; merge and export hold changes of embedding and head, given the base" if ignored else ""
            raise AdapterError(msg + hint)


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one module.

    Attributes:
        factors: a (K, I), b (O, K).
        lost: squared Frobenius norm of what the factors leave out of the true update; 0 if they are exact.
    """

    factors: LoRAFactors
    lost: float = 0.0

    def truncated(self, rank: int | None) -> "Update":
        """Truncate the update to a rank and add the loss to `lost`; None or a rank not below its own does nothing."""
        factors = self.factors
        if rank is None or factors.rank <= rank:
            return self
        a, b = (np.asarray(matrix).astype(np.float64) for matrix in (factors.a, factors.b))
        less = truncate_product(factors.scale * b, a, rank)
        return Update(less.factors, self.lost + less.lost)


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        formula: its update dW, in a few words.
        read: yields (module as the file spells it, its update) for each module of an opened file.
        peft_type: the `peft_type` of its configuration, in capitals.
        check: refuses an unusable configuration; arguments are the configuration and its path.
        applies: whether a configuration and the parts in its file (see `parse_tensor_name`) are of this kind; only
            called if `peft_type` matches.
        over: names of kinds that it may be combined with.
        remark: a note for the user on how it was read, or "".
    """

    name: str
    formula: str
    read: Callable[[ParsedAdapter], Iterator[tuple[str, Update]]]
    peft_type: str = "LORA"
    check: Callable[[Config, str], None] = check_lora
    applies: Callable[[Config, Collection[str]], bool] = lambda *_: True
    over: tuple[str, ...] = ()
    remark: str = ""


def each_module(
    read: Callable[[ParsedAdapter, str], Update | None],
) -> Callable[[ParsedAdapter], Iterator[tuple[str, Update]]]:
    """Make a reader of whole files from a reader of one module, which returns None for a module without an update."""
    return lambda file: ((module, update) for module in file.modules if (update := read(file, module)) is not None)


def truncate_product(b: np.ndarray, a: np.ndarray, rank: int | None = None) -> Update:
    """Truncate b (O, K) @ a (K, I) optimally to `rank`, and drop directions below float32 rounding.

    It runs in float64 on the host, because float32 keeps few digits of the difference of two nearly equal updates
    (PiSSA). The factors are float32 with scale 1 and at least rank 1, the singular values split evenly.
    """
    u, s, vt = product_svd(b, a)
    # Relative to the factors and not to the product: if these nearly cancel, their difference is rounding.
    noise = np.finfo(np.float32).eps * np.linalg.norm(b) * np.linalg.norm(a)
    full = max(1, int(np.count_nonzero(s > noise)))
    kept = full if rank is None else min(rank, full)
    root = np.sqrt(s[:kept])
    factors = LoRAFactors(
        a=np.ascontiguousarray(root[:, None] * vt[:kept], np.float32),
        b=np.ascontiguousarray(u[:, :kept] * root, np.float32),
    )
    return Update(factors, float(np.sum(s[kept:full] ** 2)))


def product_svd(b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the SVD of b (O, K) @ a (K, I) in float64 by QR of both factors and the SVD of the small core.

    Returns u (O, M), s (M,) descending and vt (M, I), with M the smallest of O, K and I.
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.astype(np.float64).T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T


def full_rank_factors(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factor a full-rank matrix (O, I) as b @ a, where one factor is the identity of its shorter side."""
    rows, columns = matrix.shape
    one = np.eye(min(rows, columns), dtype=matrix.dtype)
    return (matrix, one) if columns <= rows else (one, matrix)


def read_or_reason(read: Callable[[], T]) -> tuple[T | None, str]:
    """Call `read` and return its result and ""; if the change cannot be read, return None and the reason."""
    try:
        with np.errstate(over="raise", invalid="raise"):
            return read(), ""
    except JCrossLoRAError as error:
        return None, str(error)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None, "the file is damaged"
