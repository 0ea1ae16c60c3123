"""The matrix {kinds of model} × {features}: what each cell does, what is declared of it, and its page.

``python tests/matrix.py`` runs every cell, says which differ from what is declared here, and if none does
writes docs/matrix.md. ``tests/test_matrix.py`` runs the same cells one by one.

Every feature is tried with MoSLoRA and with PEFT's plain LoRA on the same targets. LoRA is the reference for
what must be possible: where it can, MoSLoRA can too, or refuses with a message that names the way out.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft.helpers
import torch
from accelerate import init_empty_weights
from peft import (
    ArrowConfig,
    EvaConfig,
    LoraConfig,
    PeftModel,
    XLoraConfig,
    create_arrow_model,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import save_file
from torch import Tensor, nn

import laws
import tiny
from kinds import ALL, KINDS, ROWS, Kind
from moslora import MoSLoRAConfig, replace_lora_weights_loftq
from moslora.adapters.export import export_adapter
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.refused import REFUSED_ARGUMENTS, REFUSED_STARTS
from moslora.tuner.weighted import REFUSED_IN_SUMS
from tolerances import MODEL, MODEL_SNR_DB, RELATIVE, SNR_DB, relative_error, snr_db

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"


class UnkeptError(AssertionError):
    """A feature ran and did not do what it is for."""


def hold(condition: object, otherwise: str) -> None:
    if not condition:
        raise UnkeptError(otherwise)


@dataclass
class Trial:
    """One kind of model with one method, and a folder to write into."""

    kind: Kind
    cls: type
    folder: Path

    @property
    def is_ours(self) -> bool:
        return self.cls is MoSLoRAConfig

    def build(self) -> nn.Module:
        return self.kind.build() if self.is_ours or self.kind.reference is None else self.kind.reference()

    def settings(self, **changes: Any) -> dict[str, Any]:
        return {**self.kind.settings, **changes}

    def config(self, **changes: Any) -> Any:
        return self.cls(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **self.settings(**changes)})

    def adapt(self, **changes: Any) -> PeftModel:
        return laws.adapt(self.build, self.cls, **self.settings(**changes))

    def with_two(self) -> PeftModel:
        model = self.adapt()
        model.add_adapter("other", self.config())
        return model.eval()

    def run(self, model: nn.Module, **kwargs: Any) -> Tensor:
        return run(self.kind, model, **kwargs)

    def base(self) -> Tensor:
        with torch.no_grad():
            return self.run(self.build())

    def close(self, found: Tensor, expected: Tensor, otherwise: str, merged: bool = False) -> None:
        if merged and self.kind.is_quantized and self.is_ours:
            # Merged, the sum is quantized as the base was, so it is off by about as much, twice if taken out.
            assert self.kind.unrounded is not None
            rounding = relative_error(
                run(self.kind, self.kind.build()), run(self.kind, self.kind.unrounded())
            )
            hold(relative_error(found, expected) < 3 * rounding, otherwise)
        elif self.kind.dtype == torch.float32:
            hold(relative_error(found, expected) < MODEL, otherwise)
        else:
            hold(snr_db(found, expected) > MODEL_SNR_DB[self.kind.dtype], otherwise)

    def far(self, found: Tensor, expected: Tensor, otherwise: str) -> None:
        hold(relative_error(found, expected) > 100 * MODEL, otherwise)


def run(kind: Kind, model: nn.Module, **kwargs: Any) -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    out = model(**kind.inputs(dtype), **kwargs)
    if isinstance(out, Tensor):
        return out
    return out["sample"] if "sample" in out else out["logits"]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- features ------------------------------------------------------------------------------------------------


def computes_as_lora(trial: Trial, mixer: str = "identity") -> None:
    """Output and every gradient; in low precision, the same in float64 up to rounding."""
    kind = trial.kind
    if not trial.is_ours:
        trial.far(trial.run(trial.adapt()), trial.base(), "the adapter did nothing")
    elif kind.dtype != torch.float32:
        laws.hold_to_lora(kind.build, trial.run, mixer=mixer, **kind.settings)
        low_precision(trial, mixer=mixer)
    else:
        laws.hold_to_lora(
            kind.build,
            trial.run,
            torch.float32 if kind.is_quantized else torch.float64,
            judge=kind.judge,
            judged_base=kind.reference,
            mixer=mixer,
            **kind.settings,
        )


def low_precision(trial: Trial, **settings: Any) -> None:
    """Factors stay in float32 and all learn; the output is that of the same weights in float64 up to rounding."""
    kind = trial.kind
    model = trial.adapt(**settings)
    exact = laws.adapt(lambda: kind.build().double(), **trial.settings(**settings))
    exact.load_state_dict(model.state_dict())
    out = trial.run(model)
    hold(out.dtype == kind.dtype, f"the output is {out.dtype}")
    trial.close(out, trial.run(exact), "rounding alone does not explain the output")
    out.float().square().mean().backward()
    for name, p in laws.factors_by_key(model).items():
        hold(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all(), f"{name} has no gradient")


def folds(trial: Trial) -> None:
    """With a mixer, too: LoRA with M·A in A's place gives the same output, and the chain rule the gradients."""
    computes_as_lora(trial, "kaiming")


@torch.no_grad()
def merges_as_lora(trial: Trial) -> None:
    """Where M = I the merged weights are those of LoRA with the same factors."""
    kind = trial.kind
    lora = laws.adapt(kind.reference or kind.build, LoraConfig, **kind.settings)
    kind.judge(lora)
    expected = trial.run(lora)
    if trial.is_ours:
        ours = trial.adapt(mixer="identity")
        held = laws.factors_by_key(lora)
        for name, p in laws.factors_by_key(ours).items():
            if name.replace("moslora_", "lora_") in held:
                held[name.replace("moslora_", "lora_")].copy_(p)
        merged = ours.merge_and_unload(safe_merge=True)
        judged = lora.merge_and_unload(safe_merge=True)
        if kind.is_quantized:
            trial.close(
                trial.run(merged), trial.run(judged), "merged weights differ from LoRA's", merged=True
            )
            return
        other = judged.state_dict()
        hold(merged.state_dict().keys() == other.keys(), "merging leaves other weights than LoRA does")
        for name, weight in merged.state_dict().items():
            if weight.is_floating_point():
                trial.close(weight, other[name], f"merged {name} differs from LoRA's")
    else:
        trial.close(trial.run(lora.merge_and_unload()), expected, "merging changes the output", merged=True)


@torch.no_grad()
def merges_and_unmerges(trial: Trial) -> None:
    model, base = trial.adapt(), trial.base()
    expected = trial.run(model)
    model.merge_adapter(safe_merge=True)
    trial.close(trial.run(model), expected, "merging changes the output", merged=True)
    model.unmerge_adapter()
    trial.close(trial.run(model), expected, "unmerging changes the output", merged=True)
    with model.disable_adapter():
        trial.close(trial.run(model), base, "unmerging does not bring back the base", merged=True)


@torch.no_grad()
def merges_and_unloads(trial: Trial) -> None:
    model = trial.adapt()
    expected = trial.run(model)
    merged = model.merge_and_unload(safe_merge=True)
    trial.close(trial.run(merged), expected, "merging changes the output", merged=True)
    classes = [type(module) for module in trial.build().modules()]
    hold([type(module) for module in merged.modules()] == classes, "unloading leaves other modules")


@torch.no_grad()
def saves_and_loads(trial: Trial, low_cpu_mem_usage: bool = False) -> None:
    model = trial.adapt()
    expected = trial.run(model)
    trial.far(trial.base(), expected, "the adapter did nothing")
    model.save_pretrained(trial.folder, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(trial.build(), trial.folder, low_cpu_mem_usage=low_cpu_mem_usage)
    trial.close(trial.run(loaded.eval()), expected, "loading changes the output")


def loads_through_meta(trial: Trial) -> None:
    saves_and_loads(trial, low_cpu_mem_usage=True)


@torch.no_grad()
def adapts_a_meta_base(trial: Trial) -> None:
    """A base without values is adapted, and gets all its values at once afterwards."""
    model = trial.adapt()
    with init_empty_weights(include_buffers=False):
        empty = (trial.kind.anew if trial.is_ours else trial.kind.reference or trial.kind.anew)()
    torch.manual_seed(1)
    twin = get_peft_model(empty, trial.config()).eval()
    factors = laws.factors_by_key(twin).values()
    hold(factors and all(p.is_meta for p in factors), "factors of a meta base have values")
    twin.load_state_dict(model.state_dict(), assign=True)
    trial.close(trial.run(twin), trial.run(model), "assigning values gives another output")


@torch.no_grad()
def begins_with_loftq(trial: Trial) -> None:
    """From what quantization took: nearer to the weights before it, and what is trained travels."""
    assert trial.kind.unrounded is not None
    whole = trial.kind.unrounded()
    save_file(dict(whole.state_dict()), trial.folder / "model.safetensors")
    model = get_peft_model(trial.build(), trial.config(init_lora_weights="loftq")).eval()
    replace_lora_weights_loftq(model, str(trial.folder))
    expected = trial.run(whole)
    hold((trial.run(model) - expected).norm() < (trial.base() - expected).norm(), "it begins no nearer")
    travels(trial, model)


@torch.no_grad()
def disables(trial: Trial) -> None:
    model, base = trial.adapt(), trial.base()
    expected = trial.run(model)
    with model.disable_adapter():
        trial.close(trial.run(model), base, "disabling leaves something of the adapter")
    trial.close(trial.run(model), expected, "enabling does not bring the adapter back")


@torch.no_grad()
def switches(trial: Trial) -> None:
    """Between two adapters, to both at once, and back."""
    model = trial.with_two()
    one = trial.run(model)
    model.set_adapter("other")
    other = trial.run(model)
    trial.far(other, one, "switching changes nothing")
    model.base_model.set_adapter(["default", "other"])
    both = trial.run(model)
    trial.far(both, one, "two adapters give what one gives")
    trial.far(both, other, "two adapters give what one gives")
    model.set_adapter("default")
    trial.close(trial.run(model), one, "switching back gives another output")


@torch.no_grad()
def deletes(trial: Trial) -> None:
    model = trial.with_two()
    one = trial.run(model)
    model.delete_adapter("other")
    hold(not any("other" in name for name in laws.factors_by_key(model)), "a deleted adapter leaves factors")
    trial.close(trial.run(model), one, "deleting another adapter changes the output")


@torch.no_grad()
def serves_mixed_batches(trial: Trial) -> None:
    model = trial.with_two()
    names = ["other", "__base__", "default"]
    mixed = trial.run(model, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            alone = trial.base()
        else:
            model.set_adapter(name)
            alone = trial.run(model)
        rows = len(mixed) // ROWS
        part = slice(row * rows, (row + 1) * rows)
        trial.close(mixed[part], alone[part], f"a row of {name} is not what {name} gives")


@torch.no_grad()
def sums(trial: Trial) -> None:
    """A weighted adapter at 1 and 1 is both adapters, and at 1 alone the adapter itself."""
    model = trial.with_two()
    one = trial.run(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type="cat")
    model.set_adapter("same")
    trial.close(trial.run(model), one, "weight 1 is not the identity")
    model.set_adapter("sum")
    found = trial.run(model)
    model.base_model.set_adapter(["default", "other"])
    trial.close(found, trial.run(model), "the sum is not both adapters")


@torch.no_grad()
def hotswaps(trial: Trial) -> None:
    model = trial.with_two()
    model.save_pretrained(trial.folder, selected_adapters=["other"], save_embedding_layers=False)
    model.set_adapter("other")
    expected = trial.run(model)
    fresh = trial.adapt()
    trial.far(trial.run(fresh), expected, "both adapters give the same")
    hotswap_adapter(fresh, str(trial.folder / "other"), adapter_name="default")
    trial.close(trial.run(fresh), expected, "the adapter in the other's place gives another output")


def checkpoints(trial: Trial) -> None:
    """Gradients are the same, and something did run twice."""
    results, counts = [], []
    for enabled in (False, True):
        model = trial.adapt().train()
        base = model.get_base_model()
        if enabled and hasattr(base, "enable_gradient_checkpointing"):
            base.enable_gradient_checkpointing()
        elif enabled:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls = Counter[nn.Module]()
        for module in model.modules():
            module.register_forward_pre_hook(lambda module, _, calls=calls: calls.update([module]))
        torch.manual_seed(4)
        trial.run(model).float().square().mean().backward()
        counts.append(calls.total())
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    hold(counts[1] > counts[0], "nothing was run again")
    for one, two in zip(*results, strict=True):
        trial.close(two.to_dense(), one.to_dense(), "gradients differ with checkpointing")


@torch.no_grad()
def compiles(trial: Trial) -> None:
    """Whole, without a graph break."""
    model = trial.adapt()
    expected = trial.run(model)
    if hasattr(model.get_base_model(), "set_experts_implementation"):
        model.get_base_model().set_experts_implementation(
            "batched_mm"
        )  # a loop over tokens' choices never compiles
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    trial.close(trial.run(compiled), expected, "compiling changes the output")
    torch._dynamo.reset()


@torch.no_grad()
def copies(trial: Trial) -> None:
    model = trial.adapt()
    expected = trial.run(model)
    twin = copy.deepcopy(model)
    trial.close(trial.run(twin), expected, "a copy gives another output")
    for p in laws.factors_by_key(twin).values():
        p.zero_()
    trial.close(trial.run(twin), trial.base(), "a copy without update is not the base")
    trial.close(trial.run(model), expected, "a copy shares its factors")


def takes(**arguments: Any) -> Callable[[Trial], None]:
    """An argument of LoRA's has LoRA's meaning, and what it trains travels. A callable is asked for its value."""

    def test(trial: Trial) -> None:
        kind = trial.kind
        settings = {key: value(kind) if callable(value) else value for key, value in arguments.items()}
        model = trial.adapt(**settings)
        if trial.is_ours and not kind.reference:
            laws.same_targets(kind.build, **trial.settings(**settings))
        travels(trial, model)

    return test


@torch.no_grad()
def travels(trial: Trial, model: PeftModel) -> None:
    """What is trained is saved and loaded."""
    generator = torch.Generator().manual_seed(7)
    trained = [p for p in model.parameters() if p.requires_grad]
    hold(trained, "nothing is trained")
    for p in trained:
        p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=0.1)
    expected = trial.run(model)
    trial.far(trial.base(), expected, "training did nothing")
    model.save_pretrained(trial.folder, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(trial.build(), trial.folder).eval()
    trial.close(trial.run(loaded), expected, "what was trained does not travel")


@torch.no_grad()
def begins_with_eva(trial: Trial) -> None:
    """From what the layers see, by PEFT's own call; nothing is changed at first, and what is trained travels."""
    config = trial.config(init_lora_weights="eva", r=2, eva_config=EvaConfig(rho=1.0))
    model = get_peft_model(trial.build(), config).eval()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    initialize_lora_eva_weights(
        model,
        [trial.kind.inputs(dtype)],
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0].flatten(0, -2).contiguous(),
        show_progress_bar=False,
    )
    trial.close(trial.run(model), trial.base(), "a fresh adapter changes the output")
    travels(trial, model)


def freezes_its_mixers(trial: Trial) -> None:
    """train_mixer=False: A and B move, M does not."""
    model = trial.adapt(train_mixer=False)
    before = {name: p.detach().clone() for name, p in laws.factors_by_key(model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    trial.run(model).float().square().mean().backward()
    optimizer.step()
    for name, p in laws.factors_by_key(model).items():
        is_mixer = ".moslora_M." in name or ".moslora_embedding_M." in name
        hold(torch.equal(p, before[name]) == is_mixer, f"{name} {'moved' if is_mixer else 'did not move'}")


@torch.no_grad()
def matches_its_scale(trial: Trial) -> None:
    """match_scale: ‖M·A‖ starts as ‖A‖, of every expert; where A starts at zero, ‖B·M‖ as ‖B‖."""
    # On a base of low precision factors start in its dtype, as LoRA's do, and are rounded before they are float32.
    dtype = trial.kind.dtype
    bound = RELATIVE[dtype] if dtype in RELATIVE else 10 ** (-SNR_DB[dtype] / 20)
    model = trial.adapt(match_scale=True, init_lora_weights=True)
    for layer in (m for m in model.modules() if isinstance(m, MoSLoRALayer)):
        A, M, B, _ = (f.double() if isinstance(f, Tensor) else f for f in layer.factors("default"))
        one, two = (A, M @ A) if A.any() else (B, B @ M)
        norms = torch.linalg.matrix_norm(one)
        hold(relative_error(torch.linalg.matrix_norm(two), norms) < bound, "the mixer changes the scale")


@torch.no_grad()
def drops(trial: Trial) -> None:
    """Dropout acts in training, and in training only."""
    model = trial.adapt(lora_dropout=0.5)
    trial.close(trial.run(model), trial.run(model), "dropout acts in evaluation")
    for module in model.modules():
        if any(hasattr(module, name) for name in ("moslora_dropout", "lora_dropout")):
            module.train()
    hold(not torch.equal(trial.run(model), trial.run(model)), "dropout does nothing")


def autocasts(trial: Trial) -> None:
    """Rounded as bfloat16 rounds; every factor gets a finite gradient in float32."""
    model = trial.adapt()
    exact = trial.run(model).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = trial.run(model)
    bound = MODEL_SNR_DB[torch.bfloat16]
    hold(trial.kind.is_routed or snr_db(out, exact) > bound, "more than bfloat16 rounds was lost")
    out.float().square().mean().backward()
    for name, p in laws.factors_by_key(model).items():
        if p.requires_grad:
            finite = p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
            hold(finite, f"{name} has no finite gradient in float32")


@torch.no_grad()
def exports(trial: Trial) -> None:
    """As a plain LoRA adapter that stock PEFT runs on a fresh base."""
    if not trial.is_ours:
        return
    model = trial.adapt()
    expected = trial.run(model)
    model.save_pretrained(trial.folder / "native", save_embedding_layers=False)
    export_adapter(trial.folder / "native", trial.folder / "lora")
    plain = PeftModel.from_pretrained((trial.kind.reference or trial.build)(), trial.folder / "lora").eval()
    hold(type(plain.peft_config["default"]) is LoraConfig, "what was exported is no LoRA")
    trial.close(trial.run(plain), expected, "stock PEFT gives another output")


def rotated(r: int) -> Tensor:
    """A mixer of a user's own: each row of A in another's place."""
    return torch.eye(r).roll(1, 0)


@torch.no_grad()
def takes_a_mixer(trial: Trial) -> None:
    """A user's mixer is where every M starts, of every expert, and it travels."""
    model = get_peft_model(trial.build(), trial.config(mixer=rotated)).eval()
    for layer in (m for m in model.modules() if isinstance(m, MoSLoRALayer)):
        _, M, _, _ = layer.factors("default")
        hold(bool((rotated(M.shape[-1]).to(M.dtype) == M).all()), "M starts elsewhere")
    expected = trial.run(model)
    model.save_pretrained(trial.folder, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(trial.build(), trial.folder).eval()
    trial.close(trial.run(loaded), expected, "the mixer does not travel")


@dataclass(frozen=True)
class Feature:
    """One row of the matrix.

    Attributes:
        test: Raises if the feature is not there.
        is_our_own: LoRA has nothing like it, and is not asked.
        only: The kinds it is tried with; all if None.
    """

    test: Callable[[Trial], None]
    is_our_own: bool = False
    only: tuple[str, ...] | None = None


FEATURES: dict[str, Feature] = {
    "M = I: output and gradients are LoRA's": Feature(computes_as_lora),
    "M = I: merged weights are LoRA's": Feature(merges_as_lora),
    "any M: output and gradients are those of the folded LoRA": Feature(folds),
    "export to LoRA, run by stock PEFT": Feature(exports, is_our_own=True),
    "save and load": Feature(saves_and_loads),
    "load with low_cpu_mem_usage": Feature(loads_through_meta),
    "adapt a base on the meta device": Feature(adapts_a_meta_base),
    "safe merge and unmerge": Feature(merges_and_unmerges),
    "merge_and_unload": Feature(merges_and_unloads),
    "disable": Feature(disables),
    "several adapters, switching": Feature(switches),
    "delete an adapter": Feature(deletes),
    "mixed batches (adapter_names)": Feature(serves_mixed_batches),
    "add_weighted_adapter": Feature(sums),
    "hotswap": Feature(hotswaps),
    "deepcopy": Feature(copies),
    "gradient checkpointing": Feature(checkpoints),
    "autocast": Feature(autocasts),
    "torch.compile(fullgraph=True)": Feature(
        compiles,
        only=(*KINDS["Layers"], "Llama", "GPT-2 (Conv1D)", "Mixtral"),
    ),
    "layers_to_transform": Feature(
        takes(layers_to_transform=lambda kind: [0], layers_pattern=lambda kind: kind.layers)
    ),
    "rank_pattern, alpha_pattern": Feature(
        takes(rank_pattern=lambda kind: {kind.pattern: 2}, alpha_pattern=lambda kind: {kind.pattern: 3})
    ),
    "use_rslora": Feature(takes(use_rslora=True)),
    'bias="all"': Feature(takes(bias="all")),
    'bias="lora_only"': Feature(takes(bias="lora_only")),
    "modules_to_save": Feature(takes(modules_to_save=lambda kind: [kind.head])),
    "lora_dropout": Feature(drops),
    "train_mixer=False": Feature(freezes_its_mixers, is_our_own=True),
    "match_scale": Feature(matches_its_scale, is_our_own=True),
    "mixer=a callable": Feature(takes_a_mixer, is_our_own=True),
    "use_dora=True": Feature(takes(use_dora=True)),
    "lora_bias=True": Feature(takes(lora_bias=True)),
    'init_lora_weights="pissa"': Feature(takes(init_lora_weights="pissa")),
    'init_lora_weights="olora"': Feature(takes(init_lora_weights="olora")),
    'init_lora_weights="eva"': Feature(begins_with_eva),
    'init_lora_weights="loftq" (PEFT\'s needs a GPU)': Feature(
        begins_with_loftq, is_our_own=True, only=("quantized",)
    ),
    'init_lora_weights="orthogonal"': Feature(takes(init_lora_weights="orthogonal")),
}


# ---- helpers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Helper:
    """Something that PEFT or transformers has for LoRA, besides the arguments of its configuration.

    Attributes:
        test: Does it, with a configuration class and a folder; raises if it cannot be done.
        says: What MoSLoRA's error says; None if it is done.
        instead: What to do then, or what else is to be said of it.
    """

    test: Callable[[type, Path], None]
    says: str | None = None
    instead: str = ""


HELPED = {"target_modules": ["q_proj", "v_proj"]}
IDS = tiny.tokens()


def helped(cls: type, **changes: Any) -> PeftModel:
    return laws.adapt(tiny.llama, cls, **{**HELPED, **changes})


def saved(cls: type, folder: Path, **changes: Any) -> Path:
    helped(cls, **changes).save_pretrained(folder)
    return folder


@torch.no_grad()
def rescales(cls: type, folder: Path) -> None:
    model, base = helped(cls), tiny.llama()
    with rescale_adapter_scale(model, 0.0):
        hold(relative_error(model(IDS).logits, base(IDS).logits) < MODEL, "at 0 something is left")


@torch.no_grad()
def swaps_a_higher_rank(cls: type, folder: Path) -> None:
    """And another alpha, after its place was made."""
    new = helped(cls, r=8, lora_alpha=3, seed=2)
    new.save_pretrained(folder)
    model = helped(cls)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    hotswap_adapter(model, str(folder), adapter_name="default")
    hold(relative_error(model(IDS).logits, new(IDS).logits) < MODEL, "it gives another output")


@torch.no_grad()
def swaps_in_transformers(cls: type, folder: Path) -> None:
    new = helped(cls, seed=2)
    new.save_pretrained(folder / "new")
    model = tiny.llama()
    model.load_adapter(str(saved(cls, folder / "old")), adapter_name="default")
    model.load_adapter(str(folder / "new"), adapter_name="default", hotswap=True)
    hold(relative_error(model(IDS).logits, new(IDS).logits) < MODEL, "it gives another output")


def has_a_rate_for_b(cls: type, folder: Path) -> None:
    model = helped(cls)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=4)
    of_B = {id(p) for name, p in model.named_parameters() if "lora_B" in name}
    faster = {id(p) for group in optimizer.param_groups if group["lr"] > 0.1 for p in group["params"]}
    hold(of_B == faster, "B has not its rate")


def finds_targets_in_a_state_dict(cls: type, folder: Path) -> None:
    model = helped(cls)
    tensors = {
        key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()
    }
    base = tiny.llama()
    inject_adapter_in_model(cls(r=4, lora_alpha=8, target_modules=["o_proj"]), base, state_dict=tensors)
    set_peft_model_state_dict(base, tensors)
    hold(relative_error(base(IDS).logits, model(IDS).logits) < MODEL, "it gives another output")


def converts(cls: type, folder: Path) -> None:
    model = helped(cls)
    peft.save_as_lora(folder, model, rank=4)
    lora = PeftModel.from_pretrained(tiny.llama(), folder)
    hold(relative_error(lora(IDS).logits, model(IDS).logits) < MODEL, "it gives another output")


def caches_norms(cls: type, folder: Path) -> None:
    model = helped(cls, use_dora=True)
    expected = model(IDS).logits
    with peft.helpers.DoraCaching():
        hold(relative_error(model(IDS).logits, expected) < MODEL, "it gives another output")


def ties(cls: type, folder: Path) -> None:
    tied = lambda: tiny.llama(tie_word_embeddings=True)  # noqa: E731
    model = laws.adapt(tied, cls, target_modules=["embed_tokens"], ensure_weight_tying=True)
    base = model.get_base_model()
    deltas = [layer.get_delta_weight("default") for layer in (base.lm_head, base.model.embed_tokens)]
    hold(relative_error(*deltas) < RELATIVE[torch.float32], "the two differ")


def elects_signs(cls: type, folder: Path) -> None:
    model = helped(cls)
    model.add_adapter("other", cls(r=4, **HELPED, init_lora_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", "dare_ties_svd", density=0.5)


def mixes_methods(cls: type, folder: Path) -> None:
    get_peft_model(tiny.llama(), cls(**HELPED), mixed=True)


def routes(cls: type, folder: Path) -> None:
    create_arrow_model(tiny.llama(), [str(saved(cls, folder))], ArrowConfig(top_k=1))


def weighs_by_input(cls: type, folder: Path) -> None:
    adapters = {"0": str(saved(cls, folder))}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters)
    get_peft_model(tiny.llama(use_cache=False), config)


def freezes_a(cls: type, folder: Path) -> None:
    create_lorafa_optimizer(helped(cls), r=4, lora_alpha=8, lr=1e-3)


def preconditions(cls: type, folder: Path) -> None:
    from peft.optimizers.riemannian import create_riemannian_optimizer

    create_riemannian_optimizer(helped(cls), torch.optim.SGD, lr=0.1)


def mitigates(cls: type, folder: Path) -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    reduce_intruder_dimension(helped(cls), logging_sink=None)


def subtracts_a_start(cls: type, folder: Path) -> None:
    model = helped(cls, init_lora_weights="pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "start")
    model.save_pretrained(folder / "end", path_initial_model_for_weight_conversion=str(folder / "start"))


def takes_layers_of_ones_own(cls: type, folder: Path) -> None:
    cls(**HELPED)._register_custom_module({nn.Bilinear: nn.Bilinear})


def sums_with_a_whole_module(cls: type, folder: Path) -> None:
    model = helped(cls, modules_to_save=["lm_head"])
    model.add_weighted_adapter(["default"], [2.0], "twice")


FOLD = "Fold the adapter (`moslora export --to lora`) and do it with the plain LoRA."
HELPERS: dict[str, Helper] = {
    "`peft.helpers.rescale_adapter_scale`": Helper(rescales),
    "`prepare_model_for_compiled_hotswap`, and adapters of other ranks and alphas": Helper(
        swaps_a_higher_rank, instead="The scale stays, and the mixer takes the difference."
    ),
    "transformers' `load_adapter(hotswap=True)`": Helper(
        swaps_in_transformers,
        instead="Of another alpha too, where LoRA continues with the old one (transformers 5.23).",
    ),
    "`create_loraplus_optimizer`": Helper(
        has_a_rate_for_b, instead="`moslora.param_groups` has a rate for M, too."
    ),
    "`inject_adapter_in_model(state_dict=…)`": Helper(finds_targets_in_a_state_dict),
    "`convert_to_lora`, `save_as_lora`": Helper(converts, instead="`moslora export` does it exactly."),
    "`peft.helpers.DoraCaching`": Helper(caches_norms, instead="Nothing is cached, so nothing gets faster."),
    "`ensure_weight_tying=True` for `target_modules`": Helper(
        ties, instead="Of every adapter, where LoRA leaves the second one untied (PEFT 0.21)."
    ),
    "`add_weighted_adapter` with `ties`, `dare_…`, `magnitude_prune`": Helper(
        elects_signs, instead="On ΔW, with `_svd` in the name or without."
    ),
    "`get_peft_model(mixed=True)`, `PeftMixedModel`": Helper(
        mixes_methods,
        "'MOSLORA' is not compatible with the `PeftMixedModel`",
        "Activate several MoSLoRA adapters together (`base_model.set_adapter` with a list). " + FOLD,
    ),
    "`XLoraConfig(adapters=…)`": Helper(weighs_by_input, "Fold it first: moslora export", FOLD),
    "`create_arrow_model`": Helper(routes, "Fold them first: moslora export", FOLD),
    "`create_lorafa_optimizer` of PEFT's": Helper(
        freezes_a,
        "Call moslora.create_lorafa_optimizer(model, lr, weight_decay) instead",
        "`moslora.create_lorafa_optimizer`.",
    ),
    "`create_riemannian_optimizer`": Helper(
        preconditions,
        "did not find any trainable lora_A/lora_B parameter pairs",
        "`moslora.param_groups` with any optimizer.",
    ),
    "`reduce_intruder_dimension`": Helper(mitigates, "The provided model is not using LoRA", FOLD),
    "`save_pretrained(path_initial_model_for_weight_conversion=…)`": Helper(
        subtracts_a_start,
        "is not supported for MoSLoRAModel",
        "Leave it out: the start is saved beside the factors, and folding subtracts it.",
    ),
    "`LoraConfig._register_custom_module`": Helper(
        takes_layers_of_ones_own,
        "would have no mixer. Leave the module out of target_modules",
        "`target_parameters`.",
    ),
    "`add_weighted_adapter` of an adapter with `modules_to_save`, `bias` or `trainable_token_indices`": Helper(
        sums_with_a_whole_module,
        "trains more than factors … of which a weighted sum has no meaning. Combine others",
        "LoRA leaves what is no factor as it is in the base.",
    ),
}


def helper_differences(name: str) -> list[tuple[str, Exception | None]]:
    """Try a helper with MoSLoRA and with LoRA, and tell what is not as declared: who, and what was raised."""
    found: list[tuple[str, Exception | None]] = []
    helper = HELPERS[name]
    for who, cls, expected in (("MoSLoRA", MoSLoRAConfig, helper.says), ("LoRA", LoraConfig, None)):
        error: Exception | None = None
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                helper.test(cls, Path(folder))
            except Exception as raised:
                error = raised
        if not says(error, expected):
            found.append((who, error))
    return found


# ---- what is declared ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a cell, or is declared of it.

    Attributes:
        ours: None if MoSLoRA did it; else what it said.
        lora: None if LoRA did it; else what it said, or what was wrong.
        because: What the page says of it besides.
    """

    ours: str | None = None
    lora: str | None = None
    because: str = ""

    @property
    def sign(self) -> str:
        """The cell's sign on the page."""
        return {(1, 1): "✓", (1, 0): "✓+", (0, 1): "✗", (0, 0): "–"}[self.ours is None, self.lora is None]


@dataclass(frozen=True)
class Exceptional:
    """Cells that are not simply ✓. Three dots stand for words that are left out.

    Attributes:
        kinds: Which kinds.
        features: Beginnings of the features' names.
        ours: What MoSLoRA says, the way out included; None if it does it.
        lora: What PEFT's LoRA says, or what is wrong with it; None if it does it.
        because: The reason, where the words are not enough.
    """

    kinds: tuple[str, ...]
    features: tuple[str, ...]
    ours: str | None = None
    lora: str | None = None
    because: str = ""


MIXTURES = ("Mixtral", "Qwen3-MoE", "gpt-oss")
MERGING = ("M = I: merged", "safe merge", "merge_and")
EXCEPTIONS: tuple[Exceptional, ...] = (
    Exceptional(
        ("Conv2d, groups",),
        MERGING,
        "Cannot merge into a convolution of 2 groups … the base weight has no place … export it as a plain LoRA",
        "Merging is not supported for _ConvNd layers with groups > 1",
    ),
    Exceptional(
        ("Conv2d, groups",),
        ("add_weighted",),
        "cannot be concatenated here … let the adapters run together: model.base_model.set_adapter(",
        "the sum is not both adapters",
    ),
    Exceptional(
        MIXTURES,
        ("add_weighted",),
        "cannot be concatenated here … let the adapters run together: model.base_model.set_adapter(",
        "add_weighted_adapter does not support targeting nn.Parameter",
    ),
    Exceptional(
        MIXTURES,
        ("mixed",),
        "is adapted as a whole, for all rows alike. Split the batch and call set_adapter for each part",
        "lora.ParamWrapper does not support mixed adapter batches",
    ),
    Exceptional(
        MIXTURES,
        ("lora_dropout",),
        "there is no input to drop from. Set lora_dropout=0 with target_parameters",
        "lora.ParamWrapper does not work with lora_dropout != 0",
    ),
    Exceptional(
        ("Embedding",),
        ("lora_dropout",),
        "dropout does nothing",
        "dropout does nothing",
        because="Its input is token ids, of which nothing can be dropped.",
    ),
    Exceptional(
        ("Embedding", "tied embedding"),
        ("hotswap",),
        lora="has no attribute 'scaling'",
        because="PEFT's hotswap looks for factors that are modules; an embedding's are parameters.",
    ),
    Exceptional(
        ("Multihead-Attention",),
        ("export",),
        "cannot be written as a plain LoRA: PEFT up to 0.21 adds the update of a MultiheadAttention's out_proj "
        "twice … Merge the adapter into its base instead",
    ),
    Exceptional(
        ("Multihead-Attention",),
        ("mixed",),
        "is adapted as a whole, for all rows alike. Split the batch and call set_adapter for each part",
        "lora.MultiheadAttention does not support mixed adapter batches",
    ),
    Exceptional(
        ("Multihead-Attention",),
        ("lora_dropout",),
        "dropout does nothing",
        "dropout does nothing",
        because="Updates are added to the weights, so there is no input to drop from; MoSLoRA warns of it.",
    ),
    Exceptional(
        ("Multihead-Attention",),
        ("torch.compile",),
        lora="Dynamo only supports mutating `.data` of tensor created outside",
        because="PEFT merges into the attention at every call, and takes it out again.",
    ),
    Exceptional(
        ("Mixtral",),
        ("torch.compile",),
        lora="a graph break should occur when calling",
        because="PEFT parametrizes the module at every call.",
    ),
    Exceptional(
        ("Multihead-Attention",),
        ("use_dora",),
        "cannot be used with this MultiheadAttention … Leave the module out … or set use_dora=False",
        "MultiheadAttention does not support DoRA",
    ),
    Exceptional(
        MIXTURES,
        ("use_dora",),
        "cannot be used with this … Leave the module out … or set use_dora=False",
        "lora.ParamWrapper does not work with use_dora=True",
    ),
    Exceptional(
        ("Embedding", "tied embedding"),
        ("lora_bias",),
        "cannot be used with this Embedding … Leave the module out … or set lora_bias=False",
        "lora_bias=True is not supported for Embedding",
    ),
    Exceptional(
        ("Multihead-Attention",),
        ("lora_bias",),
        "cannot be used with this MultiheadAttention … Leave the module out … or set lora_bias=False",
        because="In PEFT's the bias of in_proj does nothing.",
    ),
    Exceptional(
        MIXTURES,
        ("lora_bias",),
        "the update is added to the parameter … Leave the module out … or set lora_bias=False",
        "lora.ParamWrapper does not work with lora_bias=True",
    ),
    Exceptional(
        ("GPT-2 (Conv1D)",),
        ('init_lora_weights="olora"',),
        lora="shapes cannot be multiplied",
        because="PEFT decomposes the weight as Conv1D stores it, which is transposed.",
    ),
    *(
        Exceptional(
            kinds,
            ('init_lora_weights="eva"',),
            "init_lora_weights='eva' cannot be used with this … Leave the module out … or start with True",
            lora,
            because,
        )
        for kinds, lora, because in (
            (("Embedding", "tied embedding"), None, "PEFT starts an embedding as with True, and says so."),
            (
                ("Conv1d", "Conv2d", "Conv3d", "Conv2d, groups", "SDXL U-Net"),
                "Unknown initialization … eva",
                "",
            ),
            (("Multihead-Attention",), "index out of range", ""),
            (MIXTURES, "must match the size of tensor", ""),
        )
    ),
    *(
        Exceptional(
            kinds,
            (f'init_lora_weights="{start}"',),
            f"init_lora_weights='{start}' cannot be used with this … Leave the module out … or start with True",
            lora and lora.format(start=start),
        )
        for start in ("pissa", "olora", "orthogonal")
        for kinds, lora in (
            (("Embedding", "tied embedding"), None),
            (
                ("Conv1d", "Conv2d", "Conv3d", "Conv2d, groups", "SDXL U-Net"),
                "Unknown initialization … {start}",
            ),
            (("Multihead-Attention", *MIXTURES), "has no attribute 'weight'"),
        )
    ),
    Exceptional(
        ("tied embedding",),
        MERGING,
        "shares its weight with another module … Untie the base first … or leave the adapter as it is",
        "merging changes the output",
    ),
)


def _expand() -> dict[tuple[str, str], Outcome]:
    found: dict[tuple[str, str], Outcome] = {}
    for entry in EXCEPTIONS:
        for kind in entry.kinds:
            for beginning in entry.features:
                (feature,) = (name for name in FEATURES if name.startswith(beginning))
                assert kind in ALL and (kind, feature) not in found, (kind, feature)
                found[kind, feature] = Outcome(entry.ours, entry.lora, entry.because)
    return found


DECLARED = _expand()
CELLS = [
    (kind, name)
    for kind in ALL
    for name, feature in FEATURES.items()
    if feature.only is None or kind in feature.only
]


def declared(kind: str, feature: str) -> Outcome:
    """Return what is declared of a cell: that both can, if nothing else is."""
    return DECLARED.get((kind, feature), Outcome())


# ---- running -------------------------------------------------------------------------------------------------


def attempt(feature: Feature, kind: Kind, cls: type) -> Exception | None:
    """Try a feature with one method. What is warned of on the way has its tests where each kind has them."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), kind.known():
        warnings.simplefilter("ignore")
        try:
            feature.test(Trial(kind, cls, Path(folder)))
        except (
            Exception
        ) as error:  # whatever is raised is a result; whether it is the declared one is the test
            return error
    return None


def says(error: Exception | None, expected: str | None) -> bool:
    """Whether what was raised has the declared words, in their order; or nothing was, as declared."""
    if error is None or expected is None:
        return error is None and expected is None
    pattern = ".*".join(re.escape(part.strip()) for part in expected.split("…"))
    return re.search(pattern, str(error), re.DOTALL) is not None


def differences(kind: str, feature: str) -> list[tuple[str, Exception | None]]:
    """Run a cell with MoSLoRA and with LoRA, and tell what is not as declared: who, and what was raised."""
    entry, expected = FEATURES[feature], declared(kind, feature)
    found: list[tuple[str, Exception | None]] = []
    ours = attempt(entry, ALL[kind], MoSLoRAConfig)
    # To do wrongly what LoRA does is no refusal. Where LoRA does nothing either, doing nothing is.
    is_wrong = isinstance(ours, AssertionError) and expected.ours != expected.lora
    if is_wrong or not says(ours, expected.ours):
        found.append(("MoSLoRA", ours))
    lora = None if entry.is_our_own else attempt(entry, ALL[kind], LoraConfig)
    if not says(lora, expected.lora):
        found.append(("LoRA", lora))
    return found


# ---- the page ------------------------------------------------------------------------------------------------


INTRODUCTION = """\
# What works with what

Every feature below is run for every kind of model, with MoSLoRA and with PEFT's plain LoRA on the same targets, by
`tests/test_matrix.py`. LoRA is the reference: what it can, MoSLoRA can, or it refuses with a message that names the way
out. `python tests/matrix.py` writes this page, and only if every cell came out as it stands here; a test fails when
the page and the declarations in `tests/matrix.py` differ, or a cell does not do what is declared of it (also when
something refused starts to work).

| sign | meaning | cells |
|---|---|---|
"""
MEANINGS = {
    "✓": "works, as with LoRA (or is MoSLoRA's own)",
    "✓+": "works; PEFT's LoRA fails or is wrong there",
    "✗": "refused, where LoRA's counterpart has no objection; the note has the message",
    "–": "neither can; the note has the reason",
    "·": "not tried: it is for other kinds (LoftQ, for quantized ones), or to keep the tests short",
}
EXPLANATION = """
The models are tiny and random: Llama, GPT-2, T5, BART, Whisper, BERT (two layers each), Mixtral, Qwen3-MoE and
gpt-oss with their experts adapted through `target_parameters`, an SDXL U-Net of two blocks, Llava with adapters in
both towers and the projector, and for each kind of layer two blocks of it. *Quantized* is a layer that no library
made, served through PEFT's contract for quantization backends (LoRA, which does not use it, gets the same weights
unquantized); bitsandbytes, torchao and HQQ are run by `tests/test_tuner_quantized.py` where they are installed.
`torch.compile` is traced whole with the eager backend.
"""


OTHERS = """
## Living with others

Tested by `tests/test_living_with_others.py` and, with two processes, by `tests/test_distributed.py`.

- **`torch.compile`**: whole graphs, in training too. A hot-swapped adapter compiles nothing anew, whatever its alpha;
  for other ranks `prepare_model_for_compiled_hotswap` makes room. `set_adapter` compiles once for each name, the first
  time only, as with LoRA (four adapters, switched to twice: four compilations with either), because the active name is
  a constant of the graph. Past torch's limit of eight, swap.
- **DDP, FSDP, FSDP2** (`fully_shard`): two processes have the losses of one. `save_pretrained`, called on every
  process, gathers what `fully_shard` split, and loading splits it again. Flattened or empty parts (FSDP without
  `summon_full_params`, ZeRO-3 without `GatheredParameters`) are refused, and so is merging into shards. Add adapters
  before sharding: one that comes later is said not to train.
- **Gradient checkpointing**: reentrant or not, the same gradients.
- **transformers**: `add_adapter`, `set_adapter`, `disable_adapters`, `delete_adapter`, `save_pretrained` and
  `load_adapter`, with `hotswap=True` too.
- **diffusers**: its training scripts, with text encoders, checkpoints, resuming: [In diffusers' scripts](diffusers.md).
  What `save_lora_weights` writes is a plain LoRA for `load_lora_weights`, the adapter with its mixers lies beside it.
- **TRL**: `SFTTrainer` and `DPOTrainer` with `peft_config=`; with M = I held fixed the losses are LoRA's. DPO's
  reference is the base or, for an adapter that is trained on, a frozen copy of it, mixers included.
"""

SCRIPTS_OF_OTHERS = """
## Other libraries' scripts

Tested by `tests/test_ecosystem.py`: short scripts in the manner of each library's own examples, on tiny random models,
with the class name changed and nothing else. LoRA is the control.

✓ for MoSLoRA: with M = I held fixed, losses and gradient norms of every step are LoRA's; with M trained, every entry of
A, M and B moves; what the script saves (of diffusers: its checkpoints) loads to the model that it trained.
"""
CAST = """
Mixers learn however a trainer casts. Under each of the following the share of entries that move is LoRA's for A and B,
and for M all of them:

{casts}

DoRA's magnitude moves where LoRA's does (not tried in diffusers): under TRL every entry.

Models that accelerate offloads give the output that they give in memory, at every call. `cpu_offload` is tried for all
kinds of model above, and PEFT's LoRA fails there with embeddings, `nn.MultiheadAttention` and experts; `disk_offload`,
and `dispatch_model` with a part on disk, for Llama, with DoRA and PiSSA's start too.

Two processes (on the CPU, gloo) have the losses of one, up to rounding where they compute in bfloat16; where each holds
the whole model, what they train is the same to the bit:
"""


def _scripts() -> str:
    """Write what tests/test_ecosystem.py shows, by its tables."""
    from ecosystem_scripts import CASTS, EXAMPLES, NEEDED, SCRIPTS
    from ecosystem_worker import DEEPSPEED, HELD_SAYS, LORA_SAYS, TORCH, TRAINERS

    def needs(name: str) -> str:
        return f" (where {NEEDED[name]} is installed)" if name in NEEDED else ""

    scripts = [f"| {name}{needs(name)} | {EXAMPLES[name]} | ✓ | ✓ |" for name in SCRIPTS]
    casts = "\n".join(f"- {name}{needs(name)}" for name in CASTS)
    warned = [name for name, case in TORCH.items() if case.is_cast]
    ours = {
        **{name: f"✓, but not with a frozen mixer: “{said}”" for name, said in HELD_SAYS.items()},
        **dict.fromkeys(warned, "warns that most steps of M are lost: call train() before sharding"),
    }
    ways = [
        f"| {name} | {f'✗ “{LORA_SAYS[name]}”' if name in LORA_SAYS else '✓'} | {ours.get(name, '✓')} |"
        for name in [*TORCH, *TRAINERS, *DEEPSPEED]
    ]
    return "\n".join(
        [
            SCRIPTS_OF_OTHERS.rstrip("\n"),
            "",
            "| | in the manner of | LoRA | MoSLoRA |",
            "|---|---|:-:|:-:|",
            *scripts,
            CAST.format(casts=casts),
            "| | LoRA | MoSLoRA |",
            "|---|:-:|:-:|",
            *ways,
            "",
            "ZeRO is tested where DeepSpeed is installed.",
            "",
        ]
    )


ARGUMENTS = """
## What else LoRA has

Every field of the installed `LoraConfig` is accepted where it changes nothing (None, False, an empty dictionary, a
start's configuration at its defaults), which `tests/test_tuner_arguments.py` goes over field by field. Where it would
change something it works as in LoRA, or it stands here.

| argument | why it is refused | instead |
|---|---|---|
"""
OTHER_ARGUMENTS = """
PEFT's and transformers' own functions for LoRA, each tried with both by `tests/test_matrix.py`:

| | | what the error says | what to do, or to know |
|---|:-:|---|---|
"""


def refusals() -> list[str]:
    """Write what is refused of LoRA, from the tables that refuse it, and what became of the helpers."""
    lines = ARGUMENTS.rstrip("\n").split("\n")
    for name, refused in REFUSED_ARGUMENTS.items():
        if refused.is_neutral(object()):
            continue  # without effect, as what would switch it on is refused
        lines.append(f"| `{name}` | {refused.reason} | {refused.instead} |")
    for name, refused in REFUSED_STARTS.items():
        lines.append(f'| `init_lora_weights="{name}"` | {refused.reason} | {refused.instead} |')
    for name, reason in REFUSED_IN_SUMS.items():
        why, _, instead = reason.partition(". ")
        lines.append(f"| `add_weighted_adapter({name}=…)` | {why[0].upper()}{why[1:]}. | {instead} |")
    lines += OTHER_ARGUMENTS.rstrip("\n").split("\n")
    for name, helper in HELPERS.items():
        words = f"“{helper.says}”" if helper.says else ""
        lines.append(f"| {name} | {'✗' if helper.says else '✓'} | {words} | {helper.instead} |")
    return lines


def page() -> str:
    """Write the page, from what is declared."""
    signs = {cell: declared(*cell).sign for cell in CELLS}
    counts = {sign: list(signs.values()).count(sign) for sign in MEANINGS}
    counts["·"] = len(ALL) * len(FEATURES) - len(CELLS)
    lines = [INTRODUCTION.rstrip("\n")]
    lines += [f"| {sign} | {meaning} | {counts[sign]} |" for sign, meaning in MEANINGS.items()]
    lines += [f"| | all, {len(ALL)} kinds × {len(FEATURES)} features | {len(ALL) * len(FEATURES)} |"]
    lines += [EXPLANATION.rstrip("\n")]
    notes: dict[Outcome, int] = {}
    for title, kinds in KINDS.items():
        lines += ["", f"## {title}", "", "| | " + " | ".join(kinds) + " |", "|---|" + ":-:|" * len(kinds)]
        for feature in FEATURES:
            row = [feature]
            for kind in kinds:
                if (kind, feature) not in signs:
                    row.append("·")
                    continue
                outcome = declared(kind, feature)
                note = "" if outcome == Outcome() else f" {notes.setdefault(outcome, len(notes) + 1)}"
                row.append(signs[kind, feature] + note)
            lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        "## Notes",
        "",
        "In quotation marks stands what the error says, or what the test found wrong.",
        "",
    ]
    for outcome, number in notes.items():
        words = [
            f"{who}: “{text}”." for who, text in (("MoSLoRA", outcome.ours), ("LoRA", outcome.lora)) if text
        ]
        lines.append(f"{number}. " + " ".join([outcome.because, *words]).strip())
    return "\n".join([*lines, *refusals()]) + "\n" + OTHERS + _scripts()


if __name__ == "__main__":
    wrong = False
    for cell in CELLS:
        for who, error in differences(*cell):
            wrong = True
            print(f"{cell}: {who} did {'it' if error is None else repr(error)}; declared: {declared(*cell)}")
    for name, helper in HELPERS.items():
        for who, error in helper_differences(name):
            wrong = True
            print(f"{name}: {who} did {'it' if error is None else repr(error)}; declared: {helper.says}")
    if wrong:
        raise SystemExit(
            f"{PAGE.name} is as it was: mend the cells above, or what tests/matrix.py declares of them."
        )
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Ran {len(CELLS)} cells as declared. Wrote {PAGE}")
