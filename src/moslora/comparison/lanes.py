"""One training of several: its trainer, its thread, and the random state and accelerate state around it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.compat.accelerate import accumulation_state, set_accumulation_state

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["Surroundings"]


class Abandoned(BaseException):
    """Ends a trainer's thread from within."""


@dataclass
class Surroundings:
    """What a training finds outside itself, and changes: random streams, and accelerate's state of accumulation."""

    torch_state: Tensor
    cuda_states: list[Tensor]
    python_state: Any
    numpy_state: Any
    accumulation: dict[str, Any]

    @classmethod
    def now(cls) -> Surroundings:
        """Take note of the present ones."""
        import random

        import numpy
        import torch

        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(
            torch.get_rng_state(),
            cuda,
            random.getstate(),
            numpy.random.get_state(),
            accumulation_state(),
        )

    def install(self) -> None:
        """Make these the present ones."""
        import random

        import numpy
        import torch

        torch.set_rng_state(self.torch_state)
        if self.cuda_states:
            torch.cuda.set_rng_state_all(self.cuda_states)
        random.setstate(self.python_state)
        numpy.random.set_state(self.numpy_state)
        set_accumulation_state(self.accumulation)

    @contextlib.contextmanager
    def stream(self, device: torch.device) -> Iterator[None]:
        """Draw torch's random numbers for ``device`` from this training's stream."""
        import torch

        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            torch.cuda.set_rng_state(self.cuda_states[index], index)
            yield
            self.cuda_states[index] = torch.cuda.get_rng_state(index)
        else:
            torch.set_rng_state(self.torch_state)
            yield
            self.torch_state = torch.get_rng_state()

    def copy(self) -> Surroundings:
        """Return one that goes its own way."""
        return Surroundings(
            self.torch_state.clone(),
            [state.clone() for state in self.cuda_states],
            self.python_state,
            self.numpy_state,
            dict(self.accumulation),
        )


class Lane:
    """One training: its trainer, its thread and what it asks of the base.

    Its trainer's loss is asked for in two halves. ``compute_loss`` hands the batch over, waits, and returns a leaf with
    the loss's value; whatever the trainer multiplies it by before going backward (accumulation, a scaler for float16)
    is then the leaf's gradient, with which the true loss goes backward together with the others'.

    Args:
        trainer: Not run yet.
        surroundings: Those that it continues from.
    """

    def __init__(self, trainer: Any, surroundings: Surroundings) -> None:
        self.trainer = trainer
        self.surroundings = surroundings.copy()
        self.inputs: Mapping[str, Tensor] = {}
        self.denominator: Any = None
        self.loss: Tensor | None = None
        self.leaf: Tensor | None = None
        self.error: Exception | None = None
        self.ended = False
        self.abandoned = False
        self.may_run = threading.Semaphore(0)
        self.has_stopped = threading.Semaphore(0)
        self._step, self._loss = trainer.training_step, trainer.compute_loss
        trainer.training_step, trainer.compute_loss = self._training_step, self._compute_loss
        self.thread = threading.Thread(target=self._live, daemon=True)

    def _live(self) -> None:
        self.may_run.acquire()
        try:
            if not self.abandoned:
                self.trainer.train()
        except Abandoned:
            pass
        except Exception as error:
            self.error = error
        finally:
            self.ended = True
            self.has_stopped.release()

    def _wait(self) -> None:
        """Let others run, until it is this one's turn again."""
        self.has_stopped.release()
        self.may_run.acquire()
        if self.abandoned:
            raise Abandoned

    def _training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = self._step(model, inputs, num_items_in_batch)
        self._wait()  # for the gradients
        return loss

    def _compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs:
            return self._loss(model, inputs, return_outputs, num_items_in_batch)
        self.inputs, self.denominator = inputs, num_items_in_batch
        self._wait()  # for the loss
        assert self.loss is not None
        self.leaf = self.loss.detach().requires_grad_()
        return self.leaf

    def run(self) -> None:
        """Let it run until it waits or ends."""
        self.surroundings.install()
        if not self.thread.is_alive() and not self.ended:
            self.thread.start()
        self.may_run.release()
        self.has_stopped.acquire()
        self.surroundings = Surroundings.now()

    def end(self) -> None:
        """End it wherever it is, and give the trainer its own methods back."""
        self.abandoned = True
        if self.thread.is_alive():
            self.may_run.release()
            self.thread.join()
        del self.trainer.training_step, self.trainer.compute_loss
        self.loss = self.leaf = None
        self.inputs = {}

    def alone(self) -> Tensor:
        """Compute its loss as it would be alone."""
        return self._loss(self.trainer.model, self.inputs, num_items_in_batch=self.denominator)  # type: ignore[no-any-return]

    def parameters(self) -> list[nn.Parameter]:
        """Return what it trains."""
        return [p for p in self.trainer.model.parameters() if p.requires_grad]


class CannotShare(Exception):  # noqa: N818 - not an error: the cells run alone
    """Trainings cannot share their base, or not be proven to; the message says why."""
