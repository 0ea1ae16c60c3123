"""One training step on tensors without values: what lives at once is counted."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moslora.errors import PlanError
from moslora.wording import first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["count_step"]


# TRL scores trained positions in tiles of so many tokens by so many words of the vocabulary, on a GPU.
TILE_TOKENS, TILE_WORDS = 4096, 32768


def count_step(
    model: nn.Module,
    rows: int,
    length: int,
    scored: int,
    checkpointing: bool,
    device: str = "cuda",
    *,
    accumulating: bool = False,
    whole_logits: bool = False,
    learns: bool = True,
) -> int:
    """Count what a training step takes beside weights, gradients and the optimizer's state.

    Gradients appear while activations go. What is returned is so much that with all gradients it is the fullest moment,
    or nothing where the end of the backward pass is that.

    Args:
        model: An adapted causal language model of PEFT, or one with a head of labels or rewards, on any device; it is
            left as it is.
        rows: Examples in the batch.
        length: Tokens of each.
        scored: Positions of each that are trained on.
        checkpointing: Whether each block is computed again in the backward pass.
        device: ``"cuda"``: dropout and scores as they are made there; ``"cpu"``: as here.
        accumulating: Whether gradients of an earlier batch are there from the beginning.
        whole_logits: Whether the trainer makes the logits of all positions at once, as TRL's experimental trainers of
            preferences do.
        learns: Whether there is a backward pass; without, it is the forward of a reference, its adapter off.

    Returns:
        Bytes at the fullest moment of the forward and backward pass.

    Raises:
        PlanError: If the model's code asks for values that are not there.
    """
    import torch

    from moslora.compat.tracing import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), _without_values(model), _training(model, checkpointing):
        for parameter in model.parameters() if accumulating else ():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        ids = torch.zeros(rows, length, dtype=torch.long)
        # Rows of one length need no mask; padded ones do, and have one here.
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool) if rows > 1 else None
        live = _live_bytes(model)
        inner: Any = model.get_base_model()  # type: ignore[operator]
        try:
            quietly = contextlib.nullcontext() if learns else _as_reference(model)
            with live, _as_on(device, model), quietly:
                if inner.get_output_embeddings() is None:  # a head of labels or rewards
                    if getattr(inner.config, "_attn_implementation", None) == "eager":
                        mask = torch.ones(rows, length, dtype=torch.long)  # families of their own attention
                    body = inner(input_ids=ids, attention_mask=mask).logits
                    hidden = None
                    loss = body.float().sum()
                else:
                    body = inner.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
                    hidden = body.last_hidden_state[:, :scored].reshape(rows * scored, -1)
                    loss = (
                        _score_whole(inner, hidden, rows) if whole_logits else _score(inner, hidden, device)
                    )
                if learns:
                    torch.autograd.backward(loss)
        except (RuntimeError, NotImplementedError) as error:
            reason = first_line(error)
            raise PlanError(
                f"{type(inner).__name__} cannot take a step on tensors without values, so that its memory cannot be "
                f"counted ({reason}). Data-dependent control flow, such as the routing of experts, cannot be traced."
            ) from error
        del body, hidden, loss
    gc.collect()
    if not learns:
        return int(live.peak)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return int(live.peak if accumulating else max(live.peak - gradients, 0))


def _score(model: Any, hidden: torch.Tensor, device: str) -> torch.Tensor:
    """Return a loss that is made as the trainer makes it there."""
    import torch

    head = model.get_output_embeddings()
    if device == "cpu":
        from moslora.tasks.text.loss import score_rows

        return score_rows(head, hidden, torch.zeros(len(hidden), dtype=torch.long))
    words = head.weight.shape[0]

    class Tiles(torch.autograd.Function):
        """As TRL's fused head: one tile of logits at a time, and the gradient summed in float32."""

        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(hidden)
            hidden.new_empty(min(len(hidden), TILE_TOKENS), min(words, TILE_WORDS))
            return hidden.new_empty((), dtype=torch.float32)

        @staticmethod
        def backward(ctx: Any, G: torch.Tensor) -> torch.Tensor:
            (hidden,) = ctx.saved_tensors
            total = torch.empty_like(hidden, dtype=torch.float32)
            tile = hidden.new_empty(min(len(hidden), TILE_TOKENS), min(words, TILE_WORDS))
            del tile
            return total.to(hidden.dtype)

    return Tiles.apply(hidden)  # type: ignore[no-untyped-call, no-any-return]


def _score_whole(model: Any, hidden: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a loss over the logits of all positions, as TRL's trainers of CPO, SimPO and ORPO make it."""
    import torch
    from torch.nn import functional as F

    logits = model.get_output_embeddings()(hidden).reshape(rows, len(hidden) // rows, -1)
    places = torch.zeros(logits.shape[1] - 1, 1, dtype=torch.long)
    # TRL's selective_log_softmax goes row by row; the likelihood of the chosen half is taken of a copy.
    logps = [F.log_softmax(row[:-1], dim=-1).gather(1, places) for row in logits]
    chosen = logits[: rows // 2, :-1].contiguous().flatten(0, 1)
    likelihood = F.cross_entropy(chosen, torch.zeros(len(chosen), dtype=torch.long))
    return torch.stack(logps).float().sum() + likelihood.float()


@contextlib.contextmanager
def _as_reference(model: Any) -> Iterator[None]:
    """Run a model with its adapter off, without gradients, inside the block."""
    import torch

    with torch.no_grad(), model.disable_adapter():
        yield


@contextlib.contextmanager
def _without_values(model: nn.Module) -> Iterator[None]:
    """Give a model tensors without values inside the block."""
    import torch
    from torch import nn

    made: dict[int, Any] = {}
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            before.append((store, dict(store)))
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = empty
                store[name] = made[id(tensor)]
    try:
        yield
    finally:
        for store, values in before:
            store.update(values)


@contextlib.contextmanager
def _training(model: Any, checkpointing: bool) -> Iterator[None]:
    """Put a model into training mode inside the block, with or without checkpointing."""
    was_training, inner = model.training, model.get_base_model()
    model.train()
    # transformers 5.23 renamed these, and warns of the old names.
    new = hasattr(inner, "activation_checkpointing_enable")
    word = "activation" if new else "gradient"
    if checkpointing:
        reentrant = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(inner, f"{word}_checkpointing_enable")(**reentrant)
        inner.enable_input_require_grads()
    try:
        yield
    finally:
        if checkpointing:
            getattr(inner, f"{word}_checkpointing_disable")()
            inner.disable_input_require_grads()
        model.train(was_training)


@contextlib.contextmanager
def _as_on(device: str, model: nn.Module) -> Iterator[None]:
    """Let dropout be made as it is on a GPU: by torch, which keeps a mask of one byte for each entry."""
    from torch import nn

    from moslora.core import dropout

    drops = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p] if device != "cpu" else []
    largest = dropout.LARGEST_SPARSE_DROPOUT
    for module in drops:
        module.forward = functools.partial(_dropped, module.p)  # type: ignore[method-assign]
        dropout.LARGEST_SPARSE_DROPOUT = 0.0  # dropout by position is for CPUs, and draws values
    try:
        yield
    finally:
        dropout.LARGEST_SPARSE_DROPOUT = largest
        for module in drops:
            del module.forward


def _dropped(p: float, x: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.native_dropout(x, p, True)[0]


def _live_bytes(model: nn.Module) -> Any:
    """Return a mode that counts the bytes of tensors made under it while they live; ``.peak`` is the most."""
    from moslora.compat.tracing import EveryTensor

    class LiveBytes(EveryTensor):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__(lambda tensor: self.note(tensor.untyped_storage()))
            self.now = self.peak = 0
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            existing = (*model.parameters(), *model.buffers(), *grads)
            self.known = weakref.WeakKeyDictionary({t.untyped_storage(): True for t in existing})

        def note(self, storage: torch.UntypedStorage) -> None:
            if storage in self.known:
                return
            size = storage.nbytes()
            self.known[storage] = True
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, size)

        def forget(self, size: int) -> None:
            self.now -= size

    return LiveBytes()
