"""Multiple choice by log-likelihood: which text is most likely to follow a prompt?

The prompt is run once. Its keys and values are cached, and every choice continues from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moslora.data.tokenization import common_length
from moslora.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["score_choices"]


def score_choices(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    choices: Sequence[str],
    device: str,
    share_prompt: bool = True,
) -> list[float]:
    """Return the log-likelihood of each choice after the prompt.

    Args:
        model: A causal language model, adapted or not; it is put into evaluation mode.
        tokenizer: The model's.
        prompt: The text before every choice.
        choices: Texts that continue the prompt, each with the space before its first word, if there is one.
        device: Where the model is.
        share_prompt: Run the common prefix of all texts once. If false, every text is run whole: slow, for tests.

    Returns:
        One sum of log-probabilities in nats per choice, over the tokens that follow the prompt's.

    Raises:
        UsageError: If a choice adds no token.
    """
    import torch

    model.eval()
    alone = _ids(tokenizer, prompt)
    whole = [_ids(tokenizer, prompt + choice) for choice in choices]
    # A token that spans the end of the prompt and the start of a choice belongs to the choice.
    starts = [max(1, common_length(alone, ids)) for ids in whole]
    if any(len(ids) <= start for ids, start in zip(whole, starts, strict=True)):
        raise UsageError(f"One of the choices {list(choices)} adds no token to its prompt.")
    # The last shared token is run with the choices: its logits predict their first tokens.
    shared = min(starts) - 1 if share_prompt else 0
    longest = max(len(ids) for ids in whole) - shared
    rows = torch.zeros((len(whole), longest), dtype=torch.long)
    mask = torch.ones((len(whole), shared + longest), dtype=torch.long)
    for row, ids in enumerate(whole):
        rows[row, : len(ids) - shared] = torch.tensor(ids[shared:])
        mask[row, len(ids) :] = 0
    extra: dict[str, Any] = {}
    run: Any = model
    with torch.inference_mode():
        if shared:
            cache = run(
                input_ids=torch.tensor([whole[0][:shared]], device=device), use_cache=True
            ).past_key_values
            cache.batch_repeat_interleave(len(whole))
            extra = {"past_key_values": cache}
        logits = run(
            input_ids=rows.to(device), attention_mask=mask.to(device), use_cache=bool(shared), **extra
        ).logits
        likely = torch.log_softmax(logits.float(), dim=-1).cpu()  # (choices, longest, vocabulary)
    return [
        float(sum(likely[row, at - 1 - shared, ids[at]] for at in range(start, len(ids))))
        for row, (ids, start) in enumerate(zip(whole, starts, strict=True))
    ]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    # Some tokenizers append an end token to every text; nothing could follow it.
    return ids[:-1] if end is not None and len(ids) > 1 and ids[-1] == end else ids
