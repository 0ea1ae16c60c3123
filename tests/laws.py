"""The laws that every kind of adapted layer keeps, for the tests of each kind to call.

Stock PEFT's LoRA is the judge: with ``A' = M·A`` it must give the same output, and the gradients follow from
its own by the chain rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from moslora import MoSLoRAConfig
from moslora.tuner.layer import MoSLoRALayer
from tolerances import MODEL, RELATIVE, SNR_DB, relative_error, snr_db

Build = Callable[[], nn.Module]
Run = Callable[[nn.Module], Tensor]


def adapt(build: Build, cls: type = MoSLoRAConfig, seed: int = 1, **settings: object) -> PeftModel:
    """Adapt a model, with a random B, so that the adapter does something."""
    model = build()
    torch.manual_seed(seed)
    return get_peft_model(
        model, cls(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings})
    ).eval()


def factors_by_key(model: nn.Module) -> dict[str, Tensor]:
    """Every trained factor, by the name that LoRA would give it."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def compose(M: Tensor, A: Tensor) -> Tensor:
    """M·A as A is held: a matrix, a convolution, or the rows of several experts."""
    r = M.flatten(1).shape[1]
    return torch.cat(
        [
            (m @ a).view(r, *A.shape[1:])
            for m, a in zip(M.flatten(1).split(r), A.flatten(1).split(r), strict=True)
        ]
    )


def chain(M: Tensor, A: Tensor, dcomposed: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of M and A that follow from that of M·A."""
    M, A = M.detach().requires_grad_(), A.detach().requires_grad_()
    dM, dA = torch.autograd.grad(compose(M, A), (M, A), dcomposed)
    return dM, dA


def hold_to_lora(
    build: Build,
    run: Run,
    dtype: torch.dtype = torch.float64,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    judge: Callable[[nn.Module], None] = lambda model: None,
    judged_base: Build | None = None,
    **settings: object,
) -> None:
    """Output and every gradient are what stock PEFT's LoRA gives with M folded into A.

    With ``mixer="identity"`` that is: they equal LoRA's. ``prepare`` may change our factors beforehand,
    and ``judge`` may mend PEFT's model. PEFT's is put on ``judged_base``, if that is another.
    """

    def whole(build: Build = build) -> nn.Module:
        return build() if dtype == torch.float32 else build().to(dtype)  # a quantised base has no say in it

    tolerance = RELATIVE[dtype] if dtype == torch.float64 else MODEL
    lora_settings = {k: v for k, v in settings.items() if k not in ("mixer", "train_mixer")}
    ours = adapt(whole, **settings)
    lora = adapt(lambda: whole(judged_base or build), LoraConfig, **lora_settings)
    prepare(ours)
    judge(lora)
    held, judged = factors_by_key(ours), factors_by_key(lora)
    pairs = {}
    for name in held:
        if "moslora_A" in name or "moslora_embedding_A" in name:
            pairs[name] = name.replace("_A", "_M", 1)
    with torch.no_grad():
        for name, p in held.items():
            if name in pairs:
                judged[name.replace("moslora_", "lora_")].copy_(compose(held[pairs[name]], p))
            elif name not in pairs.values():
                judged[name.replace("moslora_", "lora_")].copy_(p)
    biases = sum(name.endswith(".bias") for name in judged)
    assert len(pairs) * 2 + biases == len(judged) and len(held) == len(judged) + len(pairs)
    results = []
    for model in (ours, lora):
        out = run(model)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append(out.detach())
    assert relative_error(*results) < tolerance
    base = whole()
    assert relative_error(run(base), results[0]) > 100 * MODEL, "the adapter did nothing"
    largest = max(float(p.grad.abs().max()) for p in judged.values())
    for name, p in held.items():
        if name in pairs.values():
            continue
        expected = judged[name.replace("moslora_", "lora_")].grad.to_dense()
        if name in pairs:
            M = held[pairs[name]]
            dM, expected = chain(M, p, expected)
            # Sums may cancel to nothing, so the error is taken relative to the model's largest gradient too.
            assert M.requires_grad == settings.get("train_mixer", True)
            assert not M.requires_grad or relative_error(M.grad, dM, size_of(dM, largest)) < tolerance, name
        assert relative_error(p.grad.to_dense(), expected, size_of(expected, largest)) < tolerance, name


def size_of(gradient: Tensor, largest: float) -> Tensor:
    """What an error is relative to: a gradient's largest entry, or a thousandth of the model's, if larger."""
    return torch.maximum(gradient.abs().max(), gradient.new_tensor(largest / 1000))


@torch.no_grad()
def live_through(build: Build, run: Run, folder: Path, mergeable: bool = True, **settings: object) -> None:
    """Start, switch, copy, save, load, merge and leave, as every kind of layer must."""
    base = run(build())
    fresh = adapt(build, **{**settings, "init_lora_weights": True})
    assert torch.equal(run(fresh), base), "a fresh adapter changed the output"
    model = adapt(build, **settings)
    layers = [m for m in model.modules() if isinstance(m, MoSLoRALayer)]
    assert layers and all(repr(layer).startswith("moslora.") for layer in layers)
    expected = run(model)
    assert relative_error(base, expected) > 100 * MODEL, "the adapter did nothing"
    with model.disable_adapter():
        assert torch.equal(run(model), base)
    assert torch.equal(run(model), expected)

    twin = copy.deepcopy(model)
    for p in factors_by_key(twin).values():
        p.zero_()
    rescaled = any("magnitude" in name for name in factors_by_key(twin))  # by zero, now
    assert (rescaled or torch.equal(run(twin), base)) and torch.equal(run(model), expected)

    model.save_pretrained(folder, save_embedding_layers=False)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(build(), folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(run(loaded), expected), "loading changed the output"

    other = MoSLoRAConfig(**{"r": 8, "lora_alpha": 1, "init_lora_weights": False, **settings})
    model.add_adapter("other", other)
    assert torch.equal(run(model), expected)
    model.set_adapter("other")
    changed = run(model)
    assert not torch.equal(changed, expected)
    model.base_model.set_adapter(["default", "other"])
    both = run(model)
    assert not torch.equal(both, changed) and not torch.equal(both, expected)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(run(model), expected)
    assert not any("other" in name for name in factors_by_key(model))

    if not mergeable:
        return
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert all(layer.merged for layer in layers)
        assert relative_error(run(model), expected) < MODEL
        model.unmerge_adapter()
        assert relative_error(run(model), expected) < MODEL
    with model.disable_adapter():
        assert relative_error(run(model), base) < MODEL
    merged = model.merge_and_unload(safe_merge=True)
    assert relative_error(run(merged), expected) < MODEL
    assert [(n, type(m)) for n, m in merged.named_modules()] == [
        (n, type(m)) for n, m in build().named_modules()
    ]
    assert merged.state_dict().keys() == build().state_dict().keys()


def same_targets(build: Build, **settings: object) -> None:
    """The same modules are adapted, with the same ranks and scales, and the same parameters train, as in LoRA."""
    ours, lora = adapt(build, **settings), adapt(build, LoraConfig, **settings)

    def description(model: nn.Module, prefix: str) -> tuple[dict[str, object], set[str]]:
        layers = {
            name: (dict(m.r), dict(m.scaling))
            for name, m in model.named_modules()
            if hasattr(m, "scaling") and hasattr(m, "r")
        }
        trained = {n.replace("moslora_", "lora_") for n, p in model.named_parameters() if p.requires_grad}
        return layers, {
            name for name in trained if ".lora_M." not in name and ".lora_embedding_M." not in name
        }

    assert description(ours, "moslora_") == description(lora, "lora_")


def in_low_precision(
    build: Build, run: Run, dtype: torch.dtype, autocast: bool = False, **settings: object
) -> None:
    """A low-precision base, or autocast, changes the update by rounding only; factors and gradients stay float32.

    The update alone is judged, for the base's own rounding is the base's: the difference that the adapter
    makes, against the same in float64.
    """
    exact = adapt(lambda: build().to(dtype).double(), **settings)
    rounded = adapt((lambda: build()) if autocast else (lambda: build().to(dtype)), **settings)
    with torch.no_grad():
        for one, two in zip(factors_by_key(exact).values(), factors_by_key(rounded).values(), strict=True):
            one.copy_(two)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = run(rounded)
    assert autocast or out.dtype == dtype
    assert snr_db(out, run(exact)) > SNR_DB[dtype]
    out.float().square().mean().backward()
    for p in factors_by_key(rounded).values():
        assert p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any()
