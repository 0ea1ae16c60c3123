"""MoSLoRA (arXiv:2406.11909) for PyTorch and Hugging Face: train with a mixer, ship a plain LoRA.

Importing it registers the method with PEFT, so that configurations and checkpoints of type ``"MOSLORA"``
work wherever PEFT's do. PEFT takes seconds to import; where it is not loaded yet, the registration waits
for it, so that ``moslora --help`` need not.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moslora import versions

if TYPE_CHECKING:
    from moslora.adapters.factors import Adapter
    from moslora.adapters.formats.reading import read_adapter
    from moslora.api.adapters import combine, doctor, export, import_adapter, inspect, merge, push
    from moslora.api.advising import advise
    from moslora.api.chatting import chat
    from moslora.api.judging import check_comparison, compare, evaluate
    from moslora.api.planning import plan
    from moslora.api.reporting import report
    from moslora.api.run import Run
    from moslora.api.training import check, mix, resume, train
    from moslora.errors import (
        AdapterError,
        BusyError,
        DataError,
        DiskFullError,
        EncodingError,
        ExistsError,
        HubError,
        MissingPackageError,
        ModelError,
        MoSLoRAError,
        NotFoundError,
        PictureError,
        PlanError,
        ProofError,
        RecipeError,
        Stopped,
        TrainingError,
        UsageError,
        VersionError,
    )
    from moslora.tuner.config import MoSLoRAConfig
    from moslora.tuner.loftq import replace_lora_weights_loftq
    from moslora.tuner.lora_fa import create_lorafa_optimizer
    from moslora.tuner.model import MoSLoRAModel
    from moslora.tuner.param_groups import param_groups
    from moslora.tuner.pipelines import resume_for_diffusers, save_for_diffusers

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterError",
    "BusyError",
    "DataError",
    "DiskFullError",
    "EncodingError",
    "ExistsError",
    "HubError",
    "MissingPackageError",
    "MoSLoRAConfig",
    "MoSLoRAError",
    "MoSLoRAModel",
    "ModelError",
    "NotFoundError",
    "PictureError",
    "PlanError",
    "ProofError",
    "RecipeError",
    "Run",
    "Stopped",
    "TrainingError",
    "UsageError",
    "VersionError",
    "advise",
    "chat",
    "check",
    "check_comparison",
    "combine",
    "compare",
    "create_lorafa_optimizer",
    "doctor",
    "evaluate",
    "export",
    "import_adapter",
    "inspect",
    "merge",
    "mix",
    "param_groups",
    "plan",
    "push",
    "read_adapter",
    "replace_lora_weights_loftq",
    "report",
    "resume",
    "resume_for_diffusers",
    "save_for_diffusers",
    "train",
]

# Where each public name is; it is imported when it is used.
_PLACES = {
    "Adapter": "moslora.adapters.factors",
    "AdapterError": "moslora.errors",
    "BusyError": "moslora.errors",
    "DataError": "moslora.errors",
    "DiskFullError": "moslora.errors",
    "EncodingError": "moslora.errors",
    "ExistsError": "moslora.errors",
    "HubError": "moslora.errors",
    "MissingPackageError": "moslora.errors",
    "MoSLoRAConfig": "moslora.tuner.config",
    "MoSLoRAError": "moslora.errors",
    "MoSLoRAModel": "moslora.tuner.model",
    "ModelError": "moslora.errors",
    "NotFoundError": "moslora.errors",
    "PictureError": "moslora.errors",
    "PlanError": "moslora.errors",
    "ProofError": "moslora.errors",
    "RecipeError": "moslora.errors",
    "Run": "moslora.api.run",
    "Stopped": "moslora.errors",
    "TrainingError": "moslora.errors",
    "UsageError": "moslora.errors",
    "VersionError": "moslora.errors",
    "advise": "moslora.api.advising",
    "chat": "moslora.api.chatting",
    "check": "moslora.api.training",
    "check_comparison": "moslora.api.judging",
    "combine": "moslora.api.adapters",
    "compare": "moslora.api.judging",
    "create_lorafa_optimizer": "moslora.tuner.lora_fa",
    "doctor": "moslora.api.adapters",
    "evaluate": "moslora.api.judging",
    "export": "moslora.api.adapters",
    "import_adapter": "moslora.api.adapters",
    "inspect": "moslora.api.adapters",
    "merge": "moslora.api.adapters",
    "mix": "moslora.api.training",
    "param_groups": "moslora.tuner.param_groups",
    "plan": "moslora.api.planning",
    "push": "moslora.api.adapters",
    "read_adapter": "moslora.adapters.formats.reading",
    "replace_lora_weights_loftq": "moslora.tuner.loftq",
    "report": "moslora.api.reporting",
    "resume": "moslora.api.training",
    "resume_for_diffusers": "moslora.tuner.pipelines",
    "save_for_diffusers": "moslora.tuner.pipelines",
    "train": "moslora.api.training",
}


def _register() -> None:
    """Register the method with PEFT. A version that is not known may fail at it, but does not fail to be imported."""
    try:
        from moslora.tuner.registration import register

        register()
    except Exception as error:
        if not versions.unknown():
            raise
        versions.warn_once(
            f"moslora does not know {' and '.join(versions.unknown())}, and could not register with it "
            f"({type(error).__name__}: {error}), so MoSLoRA adapters cannot be made or loaded.",
            "Install",
        )


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Registers the method at the end of PEFT's own import.

    It stays until that has happened: whoever only asks whether PEFT is there, as transformers does, finds it too.
    """

    here = threading.local()  # another thread may ask at the same moment, and needs an answer of its own

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" or getattr(self.here, "looking", False):
            return None
        self.here.looking = True  # the others are asked next, and this one among them
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self.here.looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


versions.check()
if "peft" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterPeft())


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'moslora' has no attribute {name!r}; it has {sorted(__all__)}.")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
