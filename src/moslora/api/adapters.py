"""The verbs on adapters at rest: no model is loaded, and neither PEFT nor transformers is imported but for a proof."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moslora.adapters.findings import Diagnosis
from moslora.adapters.inspection import Inspection
from moslora.api.results import CombinedAdapter, ExportedAdapter, MergedModel, PushedAdapter
from moslora.display import Display, find_display
from moslora.errors import UsageError
from moslora.failures import verb

__all__ = ["combine", "doctor", "export", "import_adapter", "inspect", "merge", "push"]

PathLike = str | os.PathLike[str]


@verb("export")
def export(
    adapter: PathLike,
    out: PathLike,
    to: str | None = None,
    *,
    engine: str | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    base: str | None = None,
    alpha: float | None = None,
    names: str | None = None,
) -> ExportedAdapter:
    """Write an adapter in another format, and prove it by reading back what was written.

    Args:
        adapter: A directory or file of any format that is read.
        out: Directory to write, or file where the format is a single one; must not exist yet.
        to: ``"lora"`` (the default), ``"native"``, ``"gguf"``, ``"diffusers"`` or ``"kohya"``. All but ``"native"``
            fold the mixers.
        engine: Instead of ``to``, the program that will run it, such as ``"vllm"`` or ``"comfyui"``: what it applies
            whole is written, or nothing.
        rank: Bring every module to this rank, by the singular values of ΔW.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; None for float32, or natively what the factors have.
        base: Base model, for formats that need its configuration, and for a LoRA that began with PiSSA or OLoRA;
            None for the one that the adapter names.
        alpha: The ``lora_alpha`` of the training, for a file that does not say it.
        names: ``"transformers-4"`` or ``"transformers-5"``, whose names of modules and form of experts are written;
            None for those that the base has in memory here.

    Returns:
        Where it is, with the proof: the largest relative error of ΔW over all modules, in float64.

    Raises:
        AdapterError: If the adapter cannot be read, or has no place in the format.
        ExistsError: If something exists at ``out``.
        ProofError: If the proof failed; nothing is left at ``out``.
        UsageError: If an argument makes no sense.

    Example:
        >>> moslora.export("my-adapter", "my-lora").proof.passed
        True
    """
    from moslora.adapters.export import export_adapter

    proof = export_adapter(
        Path(adapter),
        Path(out),
        to,
        engine=engine,
        rank=rank,
        dtype=dtype,
        base=base,
        alpha=alpha,
        names=names,
    )
    return ExportedAdapter(Path(adapter), Path(out), proof, alpha)


@verb("import")
def import_adapter(
    source: PathLike, out: PathLike, *, base: str | None = None, alpha: float | None = None
) -> ExportedAdapter:
    """Read an adapter of another program and write it natively, to train it further or to export it.

    Args:
        source: A directory or file: checkpoints of MoSLoRA's authors and of PEFT pull request 2294, PaddleNLP's in
            safetensors, files of diffusers, kohya and other image tools, or a plain LoRA, whose mixers become I.
        out: Directory to write; must not exist yet.
        base: Base model, for a LoRA that began with PiSSA or OLoRA; None for the one that the adapter names.
        alpha: The ``lora_alpha`` of the training, for a file that does not say it.

    Returns:
        Where it is, with the proof, as of ``export``.

    Raises:
        AdapterError, ExistsError, ProofError, UsageError: As for ``export``.

    Example:
        >>> moslora.import_adapter("plain-lora", "imported").proof.target
        'native'
    """
    return export(source, out, "native", base=base, alpha=alpha)


@verb("combine")
def combine(
    adapters: Sequence[PathLike],
    out: PathLike,
    weights: Sequence[float] | None = None,
    to: str = "lora",
    *,
    rank: int | None = None,
    dtype: str | None = None,
    base: str | None = None,
) -> CombinedAdapter:
    """Write the weighted sum of adapters as one, exact on ΔW.

    Factors are concatenated, never added to each other: the ranks of a module add up.

    Args:
        adapters: Adapters of any format that is read, for one base.
        out: Directory to write, or file where the format is a single one; must not exist yet.
        weights: A factor for each, unitless; may be negative. None for 1 each.
        to: A format that is written, as for ``export``.
        rank: Bring every module of the sum to this rank; None keeps it exact.
        dtype, base: As for ``export``.

    Returns:
        Where it is, with the proof: what is left of ΔW when each adapter's is subtracted.

    Raises:
        AdapterError, ExistsError, ProofError, UsageError: As for ``export``.

    Example:
        >>> moslora.combine(["my-adapter", "other-adapter"], "both", [1, 0.5]).proof.weights
        (1.0, 0.5)
    """
    from moslora.adapters.combine import combine as combine_adapters

    if isinstance(adapters, str | os.PathLike):
        raise UsageError(f"adapters={adapters!r} is one path; give a list of them.")
    paths = tuple(Path(adapter) for adapter in adapters)
    numbers = [1.0] * len(paths) if weights is None else list(weights)
    proof = combine_adapters(paths, numbers, Path(out), to, rank=rank, dtype=dtype, base=base)
    return CombinedAdapter(paths, Path(out), to, proof, rank)


@verb("merge")
def merge(
    base: PathLike, adapter: PathLike, out: PathLike, *, progress: str | Display | None = None
) -> MergedModel:
    """Merge an adapter into the full weights of its base, without loading the model.

    Args:
        base: Base model: a folder, a hub id, a GGUF file or a packaged name.
        adapter: Adapter of any format that is read.
        out: Directory to write; must not exist yet.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.

    Returns:
        Where it is, with the proof: entries of every changed weight, read again and compared in float64.

    Raises:
        AdapterError, ModelError: If adapter and base cannot be read, or do not fit each other.
        ExistsError: If something exists at ``out``.
        ProofError: If a weight was not changed, or not to what it should be. Nothing is left at ``out``.

    Example:
        >>> moslora.merge("base-model", "my-adapter", "merged").path.name
        'merged'
    """
    from moslora.adapters.merge import merge as merge_into

    proof = merge_into(os.fspath(base), Path(adapter), Path(out), find_display(progress).say)
    return MergedModel(os.fspath(base), Path(adapter), Path(out), proof)


@verb("inspect")
def inspect(
    adapter: PathLike,
    base: PathLike | None = None,
    *,
    html: PathLike | None = None,
    progress: str | Display | None = None,
) -> Inspection:
    """Look at what an adapter learned, module by module.

    Args:
        adapter: Adapter of any format that is read.
        base: Base model whose weights ΔW is compared with; None to look at the factors alone.
        html: A page of heat maps to write; must not exist yet.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.

    Returns:
        Every module's figures, and their medians by kind of module.

    Raises:
        AdapterError: If the adapter cannot be read.
        ExistsError: If something exists at ``html``.
        ModelError: If the base cannot be read, or has none of the adapter's modules.

    Example:
        >>> moslora.inspect("my-adapter").format
        'native'
    """
    from moslora.adapters.inspection import inspect_adapter

    name: Any = None if base is None else os.fspath(base)
    inspection = inspect_adapter(Path(adapter), name, find_display(progress).say)
    if html is not None:
        from moslora.reports.inspection import write_page

        write_page(inspection, Path(html))
    return inspection


@verb("doctor")
def doctor(
    adapter: PathLike,
    base: PathLike | None = None,
    engines: Sequence[str] = (),
    *,
    progress: str | Display | None = None,
) -> Diagnosis:
    """Check whether an adapter is sound, fits its base, and will run in the programs that you name.

    Args:
        adapter: Adapter of any format that is read.
        base: Base model to check the adapter against; None to look at the adapter alone.
        engines: Programs that will run it: ``"peft"``, ``"transformers"``, ``"vllm"``, ``"sglang"``, ``"llama.cpp"``,
            ``"ollama"``, ``"diffusers"`` or
            ``"comfyui"``. The adapter is written in the format that each loads, in a temporary folder, and read back.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.

    Returns:
        Every finding, each with its fix, and ``is_usable``.

    Raises:
        AdapterError: If nothing exists at ``adapter``.
        ModelError: If the base cannot be read.
        UsageError: If an engine is unknown.

    Example:
        >>> moslora.doctor("my-adapter", "base-model").is_usable
        True
    """
    from moslora.adapters.doctor import diagnose

    names = [engines] if isinstance(engines, str) else list(engines)
    name: Any = None if base is None else os.fspath(base)
    return diagnose(Path(adapter), name, names, find_display(progress).say)


@verb("push")
def push(
    adapter: PathLike,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base: str | None = None,
    dry_run: bool = False,
    progress: str | Display | None = None,
) -> PushedAdapter:
    """Upload an adapter with its card to the Hub; of what lies beside it nothing else.

    Args:
        adapter: A directory or file of any format that is read, or a run directory, whose plain LoRA is meant.
        repo: ``"owner/name"``; it is made if it does not exist.
        private: Whether only its owner sees it. A repository that is public already is refused then.
        revision: A branch, which is made if it does not exist; None for ``main``.
        base: Hub id of the base, where the adapter knows only a folder of this machine.
        dry_run: Find out what would be uploaded, and ask the Hub nothing.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.

    Returns:
        What was uploaded, with the number of files that the Hub has with the same hash.

    Raises:
        AdapterError: If the adapter cannot be read, or the doctor finds it broken.
        HubError: If the Hub cannot be reached, or refuses.
        UsageError: If an argument makes no sense, or there is no token.

    Example:
        >>> pushed = moslora.push("my-adapter", "ada/my-adapter", dry_run=True)
        >>> [file.name for file in pushed.pushed.files]
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    from moslora.adapters.push import push_adapter

    display = find_display(progress)
    pushed = push_adapter(
        Path(adapter),
        repo,
        private=private,
        revision=revision,
        base=base,
        dry_run=dry_run,
        say=display.say,
        bars=display.console.is_terminal and not display.quiet,
    )
    return PushedAdapter(Path(adapter), repo, revision, pushed)
