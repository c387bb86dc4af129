"""Compositions written directly in torch, by hooks on the linear modules of a transformers model."""

import math

import pytest

torch = pytest.importorskip("torch")


def select(x, out, updates, weights, arrays):
    rows = weights.argmax(dim=1)
    return torch.stack([out[i] + updates[rows[i]](x[i]) * (weights[i].max() > 0) for i in range(len(x))])


def mixture(x, out, updates, weights, arrays):
    shares = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return out + sum(shares[:, i, None, None] * update(x) for i, update in enumerate(updates))


def uniform(x, out, updates, weights, arrays):
    return mixture(x, out, updates, (weights > 0).float(), arrays)


def gated(x, out, updates, weights, arrays):
    def norm(y, name):
        return torch.nn.functional.layer_norm(
            y, y.shape[-1:], arrays[f"{name}.weight"], arrays[f"{name}.bias"], eps=1e-5
        )

    total, base = out.clone(), norm(out, "norm_base")
    for i, update in enumerate(updates):
        y = update(x)
        lora = norm(y, "norm_lora")
        gate = torch.sigmoid(
            base * arrays["weight_base"]
            + lora * arrays["weight_lora"]
            + base * lora * arrays["weight_cross"]
            + arrays["bias"]
        )
        total += (weights[:, i, None, None] > 0) * arrays["weight_out"] * gate * y
    return total


def router(x, out, updates, weights, arrays):
    values = torch.stack([update(x) for update in updates], dim=2)
    query = x @ arrays["lora_A.weight"].T @ arrays["lora_B.weight"].T
    scores = torch.einsum("pto,ptno->ptn", query, values) / math.sqrt(out.shape[-1])
    allowed = (weights > 0)[:, None, :].expand_as(scores)
    alpha = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1).nan_to_num(0.0)
    return out + torch.einsum("ptn,ptno->pto", alpha, values)


def stack(x, out, updates, weights, arrays):
    used = (weights > 0).float() * arrays["share"]
    return out + sum(used[:, i, None, None] * update(x) for i, update in enumerate(updates))


RULES = {one.__name__: one for one in (select, mixture, uniform, gated, router, stack)}


class Update:
    """B A x of one adapter in one module, the scale inside B."""

    def __init__(self, factors):
        self.a = torch.tensor(factors.a)
        self.b = torch.tensor(factors.b) * factors.scale

    def __call__(self, x):
        return x @ self.a.T @ self.b.T


def logits(model, how, adapters, fused, weights, arrays, tokens):
    """Run a transformers model with composed adapters.

    `arrays` has by module and name what belongs to the composition; `fused` is the layout of the base.
    """
    weights, handles = torch.tensor(weights), []
    for name, module in model.named_modules():
        parts = fused.get(name, ((name, 0, getattr(module, "out_features", 0)),))
        parts = [part for part in parts if any(part[0] in adapter.modules for adapter in adapters)]
        if parts:
            hook = _hook(RULES[how], parts, adapters, weights, arrays)
            handles.append(module.register_forward_hook(hook))
    assert handles
    try:
        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.numpy()
    finally:
        for handle in handles:
            handle.remove()


def _hook(rule, parts, adapters, weights, arrays):
    def hook(module, inputs, out):
        out = out.clone()
        for name, start, stop in parts:
            shape = next(one.modules[name] for one in adapters if name in one.modules)
            updates = [Update(one.modules[name]) if name in one.modules else Nothing(shape) for one in adapters]
            own = {key: torch.tensor(value) for key, value in arrays.get(name, {}).items()}
            out[..., start:stop] = rule(inputs[0], out[..., start:stop].clone(), updates, weights, own)
        return out

    return hook


class Nothing(Update):
    """The update of an adapter that does not have the module."""

    def __init__(self, like):
        super().__init__(like)
        self.a, self.b = torch.zeros_like(self.a), torch.zeros_like(self.b)
