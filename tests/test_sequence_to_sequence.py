"""Speech and sequence-to-sequence models: the fold runs in stock PEFT, and a merge into their files gives the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

import laws
import upstream
from kinds import KINDS
from moslora import MoSLoRAConfig
from moslora.adapters.doctor import diagnose
from moslora.adapters.export import export_adapter
from moslora.adapters.merge import merge
from tolerances import MODEL, relative_error

pytestmark = upstream.needs("the command needs newer ones", transformers="5")
MODELS = {
    "T5": (KINDS["Language models"]["T5"], AutoModelForSeq2SeqLM),
    "BART": (KINDS["Sequence to sequence, speech"]["BART"], AutoModelForSeq2SeqLM),
    "Whisper": (KINDS["Sequence to sequence, speech"]["Whisper"], AutoModelForSpeechSeq2Seq),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_fold_and_the_merge_give_what_the_adapter_gave(name: str, tmp_path: Path) -> None:
    kind, auto = MODELS[name]
    kind.build().save_pretrained(tmp_path / "base")
    inputs = kind.inputs(torch.float32)
    task = {} if name == "Whisper" else {"task_type": "SEQ_2_SEQ_LM"}  # which hands input_ids on, of text
    model = laws.adapt(kind.build, MoSLoRAConfig, 1, **{**kind.settings, **task})
    model.save_pretrained(tmp_path / "native")
    expected, base = model(**inputs).logits, str(tmp_path / "base")
    export_adapter(tmp_path / "native", tmp_path / "lora", base=base)
    loaded = PeftModel.from_pretrained(auto.from_pretrained(base), tmp_path / "lora").eval()
    assert relative_error(loaded(**inputs).logits, expected) < MODEL
    merge(base, tmp_path / "native", tmp_path / "merged")
    assert relative_error(auto.from_pretrained(tmp_path / "merged").eval()(**inputs).logits, expected) < MODEL
    assert relative_error(kind.build()(**inputs).logits, expected) > 100 * MODEL
    found = diagnose(tmp_path / "lora", base, ["transformers", "vllm"])
    assert len(found.applied["transformers"]) == len(loaded.peft_config) * len(
        [m for m in loaded.modules() if hasattr(m, "lora_A")]
    )
    # Of these, vLLM serves Whisper alone; what it does not know is said, and is no sound verdict.
    levels = {finding.check: finding.level for finding in found.findings}
    assert (levels.get("vllm: model") is None) == (name == "Whisper"), found.findings
