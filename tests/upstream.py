"""What of the tests needs a newer PEFT, transformers or TRL than the oldest that the library supports, and why.

``make test-lowest`` runs all the rest with the oldest. A new file runs there, too, unless ``FILES`` has it.
"""

from __future__ import annotations

from typing import Any

import pytest

from moslora import versions

# Whole files, by name: the reason, and the versions that they need.
FILES: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "benchmarks cli compare display doctor evaluate evidence full_disk harness home_data image image_fidelity "
        "image_formats inspect kill mix models plan ranks ray readme recipe report rundir shapes_image team together "
        "tokenization train verdict vision vision_families",
        "the command's tasks, which ask for these versions before they start",
        versions.FOR_THE_COMMAND,
    ),
    ("matrix", "what works with what, helpers of the newest PEFT included", versions.FOR_THE_COMMAND),
    (
        "answers constraints intervals kernels records",
        "nothing of PEFT, transformers or TRL, and runs with the newest",
        versions.FOR_THE_COMMAND,
    ),
    (
        "experts_at_rest",
        "PEFT's LoRA of experts has A and B the other way round before 0.19",
        {"peft": "0.19"},
    ),
    ("diffusers_scripts", "diffusers, which is not installed with the oldest", versions.FOR_THE_COMMAND),
)
LEFT_OUT = {f"test_{name}.py": (reason, least) for names, reason, least in FILES for name in names.split()}

# Single tests, by what their names hold. LoRA, the control, is not as it should be there either, or is not there.
TESTS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "test_gguf.py",
        "a_base_that_is_gguf_itself",
        "its rotations have another name before",
        {"transformers": "5"},
    ),
    ("test_eva.py", "other_layers_and_recipes", "the command reads a recipe there", versions.FOR_THE_COMMAND),
    (
        "test_a_configuration_of_loftq_travels",
        "",
        "the command reads a recipe there",
        versions.FOR_THE_COMMAND,
    ),
    *(
        ("test_living_with_others", name, "PEFT's forward is not one graph before", {"torch": "2.11"})
        for name in ("compiles_nothing_anew", "compiles_once_for_each", "a_compiled_model_trains")
    ),
    *(
        (test, case, "torch's own sharding does not run on CPUs before, with LoRA neither", {"torch": "2.11"})
        for test, case in (
            ("test_several_processes", "FSDP"),
            ("test_distributed.py", ""),
            ("test_fsdp1.py", ""),
        )
    ),
    ("test_ecosystem", "TRL KTO", "it is in trl.experimental before", {"trl": "1.16"}),
    ("test_ecosystem", "diffusers", "diffusers is not installed with the oldest", {"transformers": "5"}),
    ("test_ecosystem", "SDXL", "diffusers is not installed with the oldest", {"transformers": "5"}),
    (
        "on_as_if_it_had_not_stopped",
        "PEFT examples",
        "LoRA's losses differ, too, before",
        {"transformers": "5"},
    ),
    ("test_however_a_trainer_casts_the_magnitude", "TRL", "TRL casts LoRA's, too, before", {"trl": "1.16"}),
    ("an_offloaded_model", "Mixtral", "experts are modules before", {"transformers": "5"}),
    ("an_offloaded_model", "MoE", "experts are modules before", {"transformers": "5"}),
    ("an_offloaded_model", "gpt-oss", "LoRA reads factors that are not there before", {"peft": "0.20"}),
    ("test_several_processes", "experts", "experts are modules before", {"transformers": "5"}),
    ("test_ecosystem", "Trainer, FSDP2", "Trainer wants an accelerator for it before", {"transformers": "5"}),
)


# Whether PEFT's own forward compiles as one graph: torch 2.6 breaks it at PEFT's context managers, LoRA's too; 2.11 and
# later do not.
WHOLE = versions.is_at_least("torch", "2.11")


def lacking(least: dict[str, str]) -> list[str]:
    """Return what is older than a test needs, each as a part of a sentence."""
    return [
        f"{package} {version} (installed: {versions.installed(package)})"
        for package, version in least.items()
        if not versions.is_at_least(package, version)
    ]


def asked_by_transformers() -> dict[str, str]:
    """Return the PEFT that transformers' own adapter methods ask for; 5.24 asks for one that is not out yet."""
    from transformers.integrations import peft

    return {"peft": str(getattr(peft, "MIN_PEFT_VERSION", "0"))}


def skip_if_refused_by_transformers(error: ValueError) -> None:
    """Leave a test out whose call transformers refuses, whatever the method, because it asks for another PEFT."""
    lack = lacking(asked_by_transformers())
    if lack and "The version of PEFT you are using is not compatible" in str(error):
        pytest.skip(f"transformers {versions.installed('transformers')}'s own methods need {', '.join(lack)}")


def needs(reason: str, **least: str) -> pytest.MarkDecorator:
    """Leave a test out with older versions, and say why."""
    lack = lacking(least)
    return pytest.mark.skipif(bool(lack), reason=f"{reason}: needs {', '.join(lack)}")


def checkpoint_activations(model: Any, **kwargs: Any) -> None:
    """Switch gradient checkpointing on, by the name that transformers has for it."""
    new = getattr(model.get_base_model(), "activation_checkpointing_enable", None)
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)(kwargs)
