"""Mix: several trained adapters side by side, their factors frozen, and one mixer learned over all of them.

    ΔW = [w_1·s_1·B_1, …] · M · [A_1; …]    M: (Σr_i, Σr_i), at first blockdiag(M_1, …), which is the weighted sum

The blocks beside the diagonal let a subspace of one adapter act through another's, which no weighted sum can. A mix is
a run as any other; what it adds is where the factors come from, that only M is trained, and the proof that the rest
stayed as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.adapters.arithmetic import add
from moslora.adapters.export import named_for_base
from moslora.adapters.factors import Adapter
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.lineage import hash_files
from moslora.errors import AdapterError, ProofError, UsageError
from moslora.training.start_from import check_recorded_base, recorded_base

if TYPE_CHECKING:
    from torch import Tensor

    from moslora.recipe.schema import Recipe

__all__ = ["FrozenProof", "Mix", "open_mix"]

# What a recipe may say of the adapter beside what the sources decide.
DROPOUT_SETTINGS = ("lora_dropout",)
# Of the adapter section: what would train more than the mixer.
REFUSED = ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias")


@dataclass(frozen=True)
class FrozenProof:
    """That training left the factors of the sources as they were.

    Attributes:
        modules: How many modules were compared.
        tensors: How many A and B were the same bytes as the sources', read again after training.
        moved: Largest ``‖M - M0‖ / ‖M0‖`` of a module; 0 would say that nothing was learned.
    """

    modules: int
    tensors: int
    moved: float


@dataclass(frozen=True)
class Mix:
    """Several adapters whose factors are concatenated.

    Attributes:
        sources: Where they are.
        weights: What each is multiplied by at the start.
        whole: Their weighted sum as one adapter with a block-diagonal mixer.
        hashes: SHA-256 of every source's files.
        base: The base model that they are for, as the recipe names it; None if it was not said.
    """

    sources: tuple[Path, ...]
    weights: tuple[float, ...]
    whole: Adapter
    hashes: tuple[dict[str, str], ...]
    base: str | None = None

    def adjust(self, recipe: Recipe) -> Recipe:
        """Give a recipe the adapter section that the sources have.

        Args:
            recipe: What the user wants.

        Returns:
            The recipe with modules, ranks and alphas of the concatenation.

        Raises:
            ValueError: If the recipe wants more trained than a mixer.
        """
        section = recipe.adapter
        asked = [name for name in REFUSED if section.get(name)]
        if section.get("bias", "none") != "none":
            asked.append("bias")
        if asked or section.get("train_mixer") is False:
            what = f"adapter.{asked[0]}" if asked else "adapter.train_mixer=false"
            raise UsageError(
                f"{what} does not go with mix, which trains the mixers and nothing else. Leave it out."
            )
        kept = {name: section[name] for name in DROPOUT_SETTINGS if name in section}
        config = self.whole.config
        own = {name: config[name] for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
        # "identity" is the one start that the values put in its place do not hang on; inspect reads the real one.
        more = {"target_modules": list(config["target_modules"]), "mixer": "identity", "bias": "none"}
        return recipe.model_copy(update={"adapter": {**own, **more, **kept}})

    def check_base(self, name: str, path: str, fingerprint: Any) -> str | None:
        """Hold the base of the sources against the recipe's.

        Args:
            name: The recipe's base.
            path: Its folder.
            fingerprint: Its hashes.

        Returns:
            What to warn of, if the bases have other names and no hashes to compare.

        Raises:
            AdapterError: If a source was trained, by the hashes of its run, on another base.
        """
        warning = None
        for source in self.sources:
            named = self.whole.config.get("base_model_name_or_path")
            found = check_recorded_base(source, recorded_base(source), named, name, path, fingerprint)
            warning = warning or found
        return warning

    def put_into(self, model: Any) -> None:
        """Put the factors into an adapted model, and leave only the mixers to be trained.

        Args:
            model: A ``PeftModel`` with a fresh adapter of the configuration that ``adjust`` gave.

        Raises:
            AdapterError: If the model does not have the adapter's modules in its shapes.
        """
        from moslora.tuner.layer import MoSLoRALayer

        layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, MoSLoRALayer)}
        strange = sorted(layers.keys() ^ self.whole.modules.keys())
        if strange:
            raise AdapterError(
                f"The base has not the modules that the adapters have, as {strange[0]}. Name the base that they were "
                "trained on."
            )
        [adapter] = model.active_adapters
        for name, layer in layers.items():
            factors = self.whole.modules[name]
            held, wanted = layer.factors(adapter), (factors.A, factors.M, factors.B)
            shapes = [[tuple(t.shape) for t in tensors] for tensors in (held[:3], wanted)]
            if shapes[0] != shapes[1] or held[3] != 1:
                raise AdapterError(
                    f"{name} has factors of shapes {shapes[0]} in this base, the adapters {shapes[1]}."
                )
            layer.set_factors(adapter, *wanted)
            names = layer.adapter_layer_names
            layer.frozen_peft_weight_names[adapter] = (names[0], names[2])
        model.set_adapter(adapter)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if len(trained) != len(layers) or not all("moslora_M" in n or "embedding_M" in n for n in trained):
            raise AdapterError(
                f"More than the mixers would be trained: {trained[:3]}. This is a fault of moslora."
            )

    def prove(self, written: Path) -> FrozenProof:
        """Compare what was saved with the sources, read again.

        Args:
            written: The native adapter that the run saved.

        Returns:
            What was compared.

        Raises:
            ProofError: If a byte of an A or B is another.
        """
        import torch

        found, again = read_adapter(written), open_mix(self.sources, self.weights, self.base)
        if again.hashes != self.hashes:
            raise ProofError(
                "The sources changed while the mix was trained. Put the old files back and start again."
            )
        if found.modules.keys() != again.whole.modules.keys():
            raise ProofError(f"{written} has other modules than the sources.")
        tensors, moved = 0, 0.0
        for name, start in again.whole.modules.items():
            end = found.modules[name]
            for part, old, new in (("A", start.A, end.A), ("B", start.B, end.B)):
                if end.scale != 1 or old.dtype != new.dtype or not torch.equal(_bits(old), _bits(new)):
                    raise ProofError(f"{part} of {name} is not what the sources have, though it was frozen.")
                tensors += 1
            moved = max(moved, float((end.M.double() - start.M.double()).norm() / start.M.double().norm()))
        if moved == 0:
            raise ProofError(
                "No mixer has moved from its start, so nothing was learned. Train longer, or faster."
            )
        return FrozenProof(len(found.modules), tensors, moved)


def _bits(tensor: Tensor) -> Tensor:
    import torch

    return tensor.contiguous().view(torch.uint8)


def open_mix(
    sources: Sequence[str | Path], weights: Sequence[float] | None = None, base: str | None = None
) -> Mix:
    """Read adapters and lay them side by side.

    Args:
        sources: Adapters of any format that is read, for one base; a module may be missing in some, and ranks differ.
        weights: A factor for each, unitless; None for 1 each. They set where the mixer starts.
        base: The base that they were trained on, for starts that PEFT took out of it (PiSSA, OLoRA).

    Returns:
        The adapters as one.

    Raises:
        AdapterError: If they cannot be read or added, or have modules whose factors cannot be concatenated in
            a model.
    """
    paths = tuple(Path(source) for source in sources)
    factors = tuple(float(w) for w in weights) if weights is not None else (1.0,) * len(paths)
    hashes = tuple(hash_files(path) if path.exists() else {} for path in paths)
    whole = add([named_for_base(read_adapter(path, base=base), "native", base)[0] for path in paths], factors)
    if not whole.modules:
        raise AdapterError("The adapters have no modules, so there is nothing to mix.")
    whole.refuse_biases("A mix trains mixers and nothing else, and would leave the bias as it is")
    odd = [n for n, f in whole.modules.items() if f.form.kind == "expert" or f.form.groups != 1]
    if odd or whole.config.get("unlike_lora"):
        name = odd[0] if odd else next(iter(whole.config["unlike_lora"]))
        raise AdapterError(
            f"{name} is an expert, a grouped convolution or another layer whose factors cannot be concatenated in "
            "a model. Combine or merge such adapters instead."
        )
    return Mix(paths, factors, whole, hashes, base)
