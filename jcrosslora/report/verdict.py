"""Judge a moved adapter in one sentence, from the diagnostics and, if measured, its effect."""

import math

from jcrosslora.methods import MapMethod, Method
from jcrosslora.report.record import Row, TransferReport, Verdict, weighted

# Ratios to chance. Independently trained models measure 1.0 to 1.3; related ones measure in the tens and hundreds.
CHANCE_RATIO, WEAK_RATIO = 1.5, 5.0
# Cosines of the weights themselves. Unrelated models measure below 0.02; a further-trained base above 0.9.
CHANCE_COSINE, WEAK_COSINE, SAME_COSINE = 0.1, 0.5, 0.98
# An update that keeps less than this share of its energy has no visible effect in any direction.
LOST = 0.005

_NOTHING = "expect no effect; for other ways see `jcrosslora methods`"
_LITTLE = "expect little effect; measure before use"
_MEASURE = "measure the effect with `jcrosslora evaluate`"
_SOME = "an effect is to be expected; measure it"
_MORE = " that the source wrote (a few hundred prompts of the adapter's own task, by --probe-text, can bring more)"


def verdict(report: TransferReport) -> Verdict:
    """Return what to expect of a moved adapter, by its alignment, the energy that is left of it, and its effect."""
    return report.verdict


def judge(report: TransferReport, method: Method) -> Verdict:
    """Judge a transfer by the diagnostic of its method, the energy that is left of the update, and its effect."""
    found, effect = _by_diagnostics(report, method), report.effect
    if effect is None:
        return found
    # A control is meant to be ineffective.
    measured = effect.outcome in ("ineffective", "destructive") and found.level != "control"
    return Verdict(effect.outcome if measured else found.level, f"{found.text}; {effect.sentence}")


def _by_diagnostics(report: TransferReport, method: Method) -> Verdict:
    if report.fitted is not None:
        # Prompts that the source wrote may differ much from those that the adapter was trained on.
        more = _MORE if report.wrote_prompts else ""
        text = f"the update was fitted to the behaviour of both bases on text{more}: {_SOME} with `jcrosslora evaluate`"
        return Verdict("aligned", text)
    if not isinstance(method, MapMethod):
        return Verdict("unknown", f"nothing tells what method {method.name} made of the update: {_MEASURE}")
    if method.is_control:
        return Verdict("control", "this is a random map, a control: expect no effect")
    if report.kept < LOST:
        return Verdict("lost", f"the maps kept {report.kept:.2%} of the update's energy: {_NOTHING}")
    if method.measure == "none":
        return Verdict("unknown", f"method {method.name} measures no agreement of the two bases: {_MEASURE}")
    return _by_alignment(method.measure, report.rows, report.recipe.signs)


def _by_alignment(measure: str, rows: tuple[Row, ...], signs: str) -> Verdict:
    cosine = weighted(rows, "weight_cosine")
    if measure == "head cosine":
        return _by_heads(cosine)
    if measure == "part cosine" and cosine >= SAME_COSINE:
        return Verdict("aligned", f"the bases are made of the same parts (weight cosine {cosine:.3f}): {_SOME}")
    if cosine >= SAME_COSINE:
        hint = "" if measure == "weight cosine" else "; --method copy moves the whole update"
        return Verdict("aligned", f"the two bases are nearly identical (weight cosine {cosine:.3f}){hint}")
    if measure == "vector ratio":
        ratio = weighted(rows, "vector_ratio")
        if math.isnan(ratio):
            reason = "the signs of the singular vectors are not anchored" if signs == "rule" else "nothing was measured"
            return Verdict("unknown", f"alignment cannot be measured ({reason}): {_NOTHING}")
        return _by_ratio(ratio)
    if measure == "activation cosine":
        figure = weighted(rows, "activation_cosine")
        return Verdict("aligned", f"activations are aligned (cosine {figure:.2f}): {_SOME} with `jcrosslora evaluate`")
    if measure == "subspace similarity":
        ratio = _mean_similarity(rows)
        if not math.isnan(ratio):
            return _by_ratio(ratio)
    return _by_cosine(cosine)


def _mean_similarity(rows: tuple[Row, ...]) -> float:
    sides = [weighted(rows, "similarity_out"), weighted(rows, "similarity_in")]
    known = [side for side in sides if not math.isnan(side)]
    return sum(known) / len(known) if known else math.nan


def _by_ratio(ratio: float) -> Verdict:
    if ratio < CHANCE_RATIO:
        return Verdict("chance", f"alignment is at chance level ({ratio:.2f}x): {_NOTHING}")
    if ratio < WEAK_RATIO:
        return Verdict("weak", f"alignment is weak ({ratio:.2f}x chance): {_LITTLE}")
    return Verdict("aligned", f"the bases are aligned ({ratio:.1f}x chance): {_SOME}")


def _by_heads(cosine: float) -> Verdict:
    if math.isnan(cosine):
        return Verdict("unknown", f"alignment cannot be measured (no attention module was moved): {_NOTHING}")
    figure = f"cosine of their circuits {cosine:.3f}"
    if cosine < CHANCE_COSINE:
        return Verdict("chance", f"the attention heads of the two bases are unrelated ({figure}): {_NOTHING}")
    if cosine < WEAK_COSINE:
        return Verdict("weak", f"the attention heads of the two bases are distant relatives ({figure}): {_LITTLE}")
    return Verdict("aligned", f"the attention heads of the two bases are related ({figure}): {_SOME}")


def _by_cosine(cosine: float) -> Verdict:
    figure = f"weight cosine {cosine:.3f}"
    if cosine < CHANCE_COSINE:
        return Verdict("chance", f"the coordinates of the two bases are unrelated ({figure}): {_NOTHING}")
    if cosine < WEAK_COSINE:
        return Verdict("weak", f"the two bases are distant relatives ({figure}): {_LITTLE}")
    return Verdict("aligned", f"the two bases are related ({figure}): {_SOME}")
