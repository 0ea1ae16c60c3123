"""Language models: supervised fine-tuning with TRL's ``SFTTrainer``, held-out loss and answers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.data.records import Example, overlap, prompt_of, read_records, split_heldout, to_examples
from moslora.data.tokenization import Encoded, Encoder, Summary, encode_all, preview
from moslora.metrics.answers import METRICS, wilson_interval
from moslora.models.fingerprint import fingerprint
from moslora.models.gguf import materialize
from moslora.models.loading import (
    build_skeleton,
    default_device,
    load_model,
    load_tokenizer,
    quantization_options,
)
from moslora.models.names import resolve_model
from moslora.recipe.schema import build_trainer_config, resolve_trainer_arguments
from moslora.tasks.task import Answer, Count, Evaluation, Task

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import Trainer, TrainerCallback

    from moslora.models.names import ModelSource

__all__ = ["TextTask", "answer", "example_losses", "held_out_loss"]

# Tokens of a batch whose loss is measured; bounds the logits to this times the vocabulary.
LOSS_TOKENS = 1024
# Answers generated at once.
ANSWER_BATCH = 64
# Labelled positions whose logits are held at once; more are scored part by part, and recomputed in backward.
LOGIT_ROWS = 2048
# Held-out examples, and tokens of each, whose logits the proof compares.
PROBES, PROBE_TOKENS = 4, 128


class TextTask(Task):
    """Fine-tune a causal language model on messages, prompts with completions, or text."""

    # Filled by ``set_aside``; a plain run chooses nothing by them.
    validation_examples: Sequence[Example] = ()
    # What the share of right answers is called.
    share = "exact_match"
    # Whether held-out data are all that is wanted; a task may then leave the rest unread.
    measures_only = False

    def read(self) -> None:
        """Read the data and find the base model."""
        data = self.recipe.data
        self.source = resolve_model(self.recipe.model.name, self.recipe.model.revision, self.needs_weights)
        records = read_records(data.train, data.train_split, data.limit)
        self.data_hashes = {"train": records.sha256}
        self.train_examples: list[Example] = to_examples(records, data.format)
        if data.heldout is not None or data.heldout_split is not None:
            held = read_records(data.heldout or data.train, data.heldout_split or "train", None)
            self.data_hashes["heldout"] = held.sha256
            self.heldout_examples: list[Example] = to_examples(held, data.format)
        else:
            self.train_examples, self.heldout_examples = split_heldout(
                self.train_examples, data.heldout_fraction, self.recipe.seed
            )
            self.display.say(
                f"Held out {len(self.heldout_examples)} examples ({data.heldout_fraction:.0%}, chosen "
                "by content and seed), because data.heldout names none."
            )
        seen = overlap(self.train_examples, self.heldout_examples)
        if seen:
            self.display.warn(
                f"{seen} of {len(self.heldout_examples)} held-out prompts are also trained on, so the "
                "held-out numbers flatter the model. Take them out of one of the two files."
            )

    @property
    def base(self) -> ModelSource:
        """The base model, as a folder that every tool can load."""
        return self.source

    def count(self) -> list[Count]:
        """Count parameters by part of the model, from its configuration alone."""
        from peft import get_peft_model

        wanted = self.recipe.model
        source = resolve_model(wanted.name, wanted.revision, self.needs_weights)
        source = materialize(source, self._file_dtype(), say=self.display.say)
        # Named in messages of adapter_config.
        self.source = source
        model = build_skeleton(source, self.auto_class, wanted.trust_remote_code)
        sizes = {self.part_of(name): 0 for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            sizes[self.part_of(name)] += parameter.numel()
        config: Any = self.adapter_config(model)
        config.init_lora_weights = True  # where factors start changes no count, and may want weights
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        trained = dict.fromkeys(sizes, 0)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                trained[self.part_of(name)] += parameter.numel()
        return [Count(part, size, trained[part]) for part, size in sizes.items()]

    def part_of(self, module: str) -> str:
        """Return what the part of the model is called that a module or parameter belongs to."""
        return "language"

    @property
    def device(self) -> str:
        """Where the run takes place."""
        return default_device()

    def prepare(self) -> None:
        """Find the base's folder, tokenise, and show what is trained."""
        recipe = self.recipe
        self.source = materialize(self.source, self._file_dtype(), say=self.display.say)
        self.tokenizer: Any = load_tokenizer(self.source, recipe.model.trust_remote_code)
        arguments = resolve_trainer_arguments(recipe, self.device)
        encoder = Encoder(
            self.tokenizer,
            recipe.data.template,
            recipe.data.train_on,
            arguments["max_length"],
            recipe.data.too_long,
        )
        self.train_set, self.train_summary = encode_all(self.train_examples, encoder)
        self.heldout_set, self.heldout_summary = encode_all(self.heldout_examples, encoder)
        if self.validation_examples:
            self.validation_set, _ = encode_all(self.validation_examples, encoder)
        self.by_place = {example.place: example for example in self.heldout_examples}
        self.stop_ids: list[int] = sorted(encoder.stop_ids)
        # Plain text has no question in it, so there is nothing to answer.
        self.asked = [e for e in self.heldout_set if e.prompt_ids][: recipe.task.generate_examples]
        self._check_references()
        if recipe.task.metric != "none" and not self.asked:
            self.display.warn(
                f"task.metric={recipe.task.metric} has nothing to judge: no held-out example has an answer, or "
                "task.generate_examples is 0. Only the held-out loss is measured."
            )
        self._show(self.train_summary, self.heldout_summary)

    def _check_references(self) -> None:
        """Refuse references that the metric could never accept, before anything is loaded."""
        metric = METRICS.get(self.recipe.task.metric)
        if metric is None:
            return
        for encoded in self.asked:
            try:
                metric(encoded.answer, encoded.answer)
            except ValueError as error:
                raise ValueError(
                    f"task.metric={self.recipe.task.metric}, {encoded.place}: {error}"
                ) from error

    def _file_dtype(self) -> str:
        return "float32" if self.recipe.model.dtype == "auto" else self.recipe.model.dtype

    def _show(self, train: Summary, heldout: Summary) -> None:
        """Say what is trained on, with one example whose trained tokens are marked."""
        from rich.text import Text

        display = self.display
        display.say(
            f"Training examples: {train.examples}, held out: {heldout.examples}. Tokens: {train.tokens}, "
            f"of which trained: {train.trained_tokens} ({train.trained_tokens / train.tokens:.0%}). "
            f"Longest example: {train.longest} tokens."
        )
        marked = Text("One example; ")
        marked.append("⟦what is trained on⟧", "bold green")
        marked.append(":\n")
        for piece, trained in preview(self.train_set[0], self.tokenizer):
            shown = self._shorten(piece)
            marked.append(f"⟦{shown}⟧" if trained else shown, "bold green" if trained else "dim")
        display.show(marked)
        display.say()
        for name, summary in (("Training data", train), ("Held-out data", heldout)):
            for warning in summary.warnings():
                display.warn(f"{name}: {warning}")

    def _shorten(self, piece: str) -> str:
        """Return a piece of an example as it is shown."""
        return piece

    def hashes(self) -> dict[str, Any]:
        """Return hashes of the data files, the chat template and the base model."""
        template = self.tokenizer.chat_template
        return {
            "data": self.data_hashes,
            "chat_template": None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
            "base": fingerprint(self.source),
        }

    def load(self) -> nn.Module:
        """Load the base model in the recipe's dtype."""
        wanted = self.recipe.model
        model: nn.Module = load_model(
            self.source,
            wanted.dtype,
            wanted.trust_remote_code,
            wanted.attn_implementation,
            self.device,
            self.auto_class,
            self.quantization,
        )
        return model

    # Patterns of modules that are not quantised; transformers' own by default.
    whole: Sequence[str] = ()

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the base is quantised."""
        wanted = self.recipe.model
        return quantization_options(wanted.quantization, wanted.dtype, self.device, self.whole)

    def build_trainer(
        self,
        model: nn.Module,
        adapter: PeftConfig | None,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> Trainer:
        """Make TRL's trainer on the encoded examples; their labels say what is trained."""
        from datasets import Dataset

        def dataset(encoded: Sequence[Encoded]) -> Dataset:
            return Dataset.from_dict(
                {"input_ids": [e.input_ids for e in encoded], "labels": [e.labels for e in encoded]}
            )

        config = build_trainer_config(self.recipe, self.device, output_dir)
        self._lay_rows(model, config)
        wants_evaluation = config.eval_strategy != "no"
        # Lengths were cut, dropped or refused while encoding; the trainer must not do it again.
        config.dataset_kwargs = None if config.packing else {"skip_prepare_dataset": True}

        trainer = labelled_loss_trainer()(
            model=model,
            args=config,
            train_dataset=dataset(self.train_set),
            eval_dataset=dataset(self.heldout_set) if wants_evaluation else None,
            processing_class=self.tokenizer,
            peft_config=adapter,
            callbacks=list(callbacks),
        )
        if adapter is not None:
            train_in_float32(trainer.model)
        return trainer

    def _lay_rows(self, model: nn.Module, config: Any) -> None:
        """Lay the rows of a batch end to end where that is exact and less work, and say what was chosen."""
        if config.packing:
            return
        if "padding_free" not in self.recipe.trainer:
            rows = config.per_device_train_batch_size
            if rows == 1:
                return  # nothing to pad
            lengths = [len(e.input_ids) for e in self.train_set]
            found: str | None
            saved = padding_cost(model, lengths, rows, self.recipe.seed)
            if config.n_gpu > 1:
                found = "one process feeds several GPUs, which split a batch by rows"
            elif saved <= 1:
                found = f"laid end to end, attention would cost more than padding does ({saved:.2f} times)"
            else:
                found = why_rows_mix(model, self.pad_id)
                if found:
                    self.display.warn(
                        f"The rows of a batch are padded, which costs about {saved:.2f} times the work: {found}"
                    )
                    return
            if found:
                self.display.say(f"The rows of a batch are padded: {found}.")
                return
            self.display.say(
                f"The rows of a batch lie end to end; padding would cost {saved:.2f} times the work. Tried on "
                "this model: no row sees another. trainer.padding_free=false pads."
            )
            config.padding_free = True
        if config.padding_free:
            config.max_length = None  # TRL wants it; lengths were seen to while encoding

    def evaluate(self, model: nn.Module, label: str) -> Evaluation:
        """Measure held-out loss, and answers where the recipe wants them."""
        task = self.recipe.task
        metrics, intervals = {"loss": self._loss(model, label)}, {}
        answers = self.ask(model, self.asked, label) if self.asked else []
        if answers and task.metric != "none":
            right = sum(bool(a.correct) for a in answers)
            metrics["exact_match"] = right / len(answers)
            intervals["exact_match"] = wilson_interval(right, len(answers))
        return Evaluation(metrics, len(self.heldout_set), intervals, answers)

    def set_aside(self, count: int, heldout: int | None) -> int:
        """Take examples out of the training data to choose a learning rate by; call it before ``prepare``.

        Args:
            count: About how many; a quarter of the training data is the limit.
            heldout: How many held-out examples to keep, at even distances; None for all.

        Returns:
            How many were set aside. Those chosen depend on content and the recipe's seed alone.
        """
        examples = self.train_examples
        fraction = min(0.25, count / len(examples))
        rest, aside = split_heldout(examples, fraction, self.recipe.seed, self.identity_of)
        seen = {mark for example in aside for mark in self.marks(example)}
        # What has the same prompt as an example set aside is not trained on, unless all have.
        self.train_examples = [e for e in rest if seen.isdisjoint(self.marks(e))] or rest
        self.validation_examples = aside
        if heldout is not None and heldout < len(self.heldout_examples):
            every = len(self.heldout_examples)
            self.heldout_examples = [self.heldout_examples[i * every // heldout] for i in range(heldout)]
        return len(aside)

    @property
    def identity_of(self) -> Callable[[Example], Sequence[str]] | None:
        """What makes examples equal to a split; None for their content."""
        return None

    def marks(self, example: Example) -> Sequence[str]:
        """Return what an example must not share with another on the other side of a split."""
        return [prompt_of(example)]

    def score(self, model: nn.Module, examples: Sequence[Encoded], label: str) -> list[float]:
        """Return each example's loss: the mean over its trained tokens, in nats, in the order given."""
        found = [0.0] * len(examples)
        with self.display.progress(f"Loss, {label}", len(examples)) as progress:
            for chosen, losses, counts in example_losses(model, examples, self.pad_id, self.device):
                for index, loss in zip(chosen, (losses / counts.clamp(min=1)).tolist(), strict=True):
                    found[index] = loss
                progress.advance(len(chosen))
                self.checkpoint()
        return found

    def _loss(self, model: nn.Module, label: str) -> float:
        with self.display.progress(f"Held-out loss, {label}", len(self.heldout_set)) as progress:
            total, count = 0.0, 0
            for part, tokens, size in held_out_loss(model, self.heldout_set, self.pad_id, self.device):
                total, count = total + part, count + tokens
                progress.advance(size, f"loss {total / count:.4f}")
                self.checkpoint()
        return total / count

    def ask(self, model: nn.Module, chosen: Sequence[Encoded], label: str) -> list[Answer]:
        """Generate an answer to each example, in batches, and judge it by the recipe's metric."""
        metric = METRICS.get(self.recipe.task.metric)
        texts: dict[int, str] = {}
        order = sorted(range(len(chosen)), key=lambda i: len(chosen[i].prompt_ids))
        with self.display.progress(f"Answers, {label}", len(chosen)) as progress:
            for start in range(0, len(order), ANSWER_BATCH):
                batch = order[start : start + ANSWER_BATCH]
                prompts = [chosen[i].prompt_ids for i in batch]
                limit = self.recipe.task.max_new_tokens
                found = answer(model, self.tokenizer, prompts, limit, self.stop_ids, self.pad_id, self.device)
                texts.update(zip(batch, found, strict=True))
                progress.advance(len(batch))
                self.checkpoint()
        return [
            Answer(
                place=encoded.place,
                prompt=question(self.by_place[encoded.place]),
                reference=encoded.answer,
                text=texts[index],
                correct=None if metric is None else metric(texts[index], encoded.answer),
                kind=_kind(self.by_place[encoded.place]),
            )
            for index, encoded in enumerate(chosen)
        ]

    def ask_shuffled(self, model: nn.Module, label: str) -> list[Answer]:
        """Generate answers about other examples' pictures; none where there are no pictures."""
        return []

    def pictures_of(self, example: Example) -> list[str]:
        """Return the files of the pictures that a held-out example shows."""
        return []

    @property
    def pad_id(self) -> int:
        """A token to fill short rows with; it is masked, so any will do."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id or 0) if pad is None else int(pad)

    def probe(self) -> list[Tensor]:
        """Return the first held-out examples, cut to a length that is quick."""
        import torch

        return [torch.tensor([e.input_ids[:PROBE_TOKENS]]) for e in self.heldout_set[:PROBES]]


def question(example: Example) -> str:
    """Return what an example asks, as a person would read it.

    Args:
        example: Any example.

    Returns:
        The last user message, the prompt, or nothing for plain text.
    """
    if example.messages is None:
        return example.prompt or ""
    asked = [message.content for message in example.messages if message.role == "user"]
    return asked[-1] if asked else ""


def _kind(example: Example) -> str | None:
    kind = example.extra.get("kind")
    return None if kind is None else str(kind)


# Settings by which an architecture's logits are more than its head's product. TRL knows them all.
SCALED_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "output_router_logits",
)


# What TRL's trainer asks of its loss.
TRL_OUTPUTS = ("log_probs", "entropy", "is_top1")


def train_in_float32(model: nn.Module) -> None:
    """Keep in float32 what is trained, whatever the base's dtype.

    A step of 2e-5 is lost on the 8 bits of a bfloat16, without a word. Factors convert what comes in by themselves;
    modules that are trained whole are taught to, and so is TRL's loss, which reads the head's weight past its call.

    Args:
        model: An adapted model; changed in place.
    """
    import torch
    from peft.utils import ModulesToSaveWrapper

    half = (torch.bfloat16, torch.float16)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in half:
            parameter.data = parameter.data.float()

    def widen(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(g.float() if torch.is_tensor(g) and g.dtype in half else g for g in given)

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            original = next((p.dtype for p in wrapper.original_module.parameters()), torch.float32)
            for module in wrapper.modules_to_save.values():
                if original in half:
                    module.float()
                    module.register_forward_pre_hook(widen)
                    module.register_forward_hook(
                        lambda _m, _g, out, dtype=original: out.to(dtype) if torch.is_tensor(out) else out
                    )
    base = unwrapped(model)
    head = base.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper) and head.weight.dtype != head.original_module.weight.dtype:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(base, cast_lm_head_to_fp32=True, outputs=TRL_OUTPUTS)


def labelled_loss_trainer() -> Any:
    """Return TRL's ``SFTTrainer``, which on a CPU scores labelled positions only.

    On Triton devices TRL does so itself. On a CPU its output head takes every position, which on a vocabulary of
    49152 costs as much as half of the layers.
    """
    from trl import SFTTrainer

    class LabelledLossTrainer(SFTTrainer):  # type: ignore[misc]
        """Scores labelled positions only, where TRL would score all of them."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            special = return_outputs or model is not self.model or not scores_plainly(self)
            if special or inputs["labels"].device.type != "cpu":
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            # Mixed precision wraps the model's own forward, which is passed by here.
            with self.accelerator.autocast():
                total, count = labelled_loss(unwrapped(model), inputs)
            return total / (count if num_items_in_batch is None else num_items_in_batch)

    return LabelledLossTrainer


def scores_plainly(trainer: Any) -> bool:
    """Tell whether the trainer's loss is the plain one, and the model's logits its head's product alone.

    Args:
        trainer: An ``SFTTrainer``.

    Returns:
        Whether ``labelled_loss`` gives the same value.
    """
    arguments = trainer.args
    return (
        logits_are_plain(unwrapped(trainer.model))
        and arguments.loss_type == "nll"
        and not arguments.label_smoothing_factor
        and trainer.compute_loss_func is None
    )


def unwrapped(model: Any) -> Any:
    """Return the model without PEFT's wrapper; its layers stay adapted.

    Args:
        model: A model of transformers, or PEFT's around it.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logits_are_plain(model: Any) -> bool:
    """Tell whether a model's logits are its head's product and nothing more.

    Args:
        model: A causal language model of transformers.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    return head is not None and not any(getattr(config, name, None) for name in SCALED_LOGITS)


def labelled_loss(model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood over the labelled positions, taking logits nowhere else.

    Args:
        model: A causal language model of transformers whose logits are its head's product.
        inputs: ``input_ids``, ``labels`` and maybe ``attention_mask`` or ``position_ids``, ``(rows, length)``.

    Returns:
        The sum in nats, and over how many tokens (at least 1).
    """
    arguments = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
    hidden = model.base_model(**arguments, use_cache=False).last_hidden_state  # (rows, length, d)
    return score_labels(model.get_output_embeddings(), hidden, inputs["labels"])


def score_labels(head: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood over the labelled positions, from what the last layer made.

    Args:
        head: The output embeddings.
        hidden: Shape ``(rows, length, d)``.
        labels: Token ids, -100 where nothing is trained, ``(rows, length)``.

    Returns:
        The sum in nats, and over how many tokens (at least 1).
    """
    targets = labels[:, 1:]
    trained = targets != -100
    total = score_rows(head, hidden[:, :-1][trained], targets[trained])
    return total, trained.sum().clamp(min=1)


def score_rows(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum the negative log-likelihood of tokens, holding the logits of ``LOGIT_ROWS`` at a time.

    Args:
        head: What turns hidden states into logits.
        hidden: Shape ``(tokens, d)``.
        targets: Token ids, shape ``(tokens,)``.

    Returns:
        The sum, in nats.
    """
    import torch
    from torch.nn import functional as F
    from torch.utils.checkpoint import checkpoint

    def score(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float()  # (tokens, vocabulary)
        return F.cross_entropy(logits, targets, reduction="sum")

    parts = list(zip(torch.split(hidden, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True))
    if len(parts) > 1 and torch.is_grad_enabled():
        # Logits of one part at a time exist, in forward and again in backward.
        return torch.stack([checkpoint(score, *part, use_reentrant=False) for part in parts]).sum()
    return torch.stack([score(*part) for part in parts]).sum()


def padding_cost(model: nn.Module, lengths: Sequence[int], rows: int, seed: int) -> float:
    """Estimate how much more work padded batches are than the same rows laid end to end.

    End to end, dense attention goes over all pairs of a batch's tokens; padded, over those of its longest row.

    Args:
        model: A causal language model of transformers.
        lengths: Tokens of each example.
        rows: Examples per batch.
        seed: Decides which examples fall into one batch.

    Returns:
        The ratio; below 1, padding is the cheaper.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    head = sum(
        p.numel()
        for p in {*model.get_input_embeddings().parameters(), *_head_parameters(model)}  # type: ignore[operator]
    )
    per_token = sum(p.numel() for p in model.parameters()) - head
    implementation = getattr(config, "_attn_implementation", None) or ""
    per_pair = 2 * config.num_hidden_layers * config.hidden_size
    order = random.Random(seed).sample(list(lengths), len(lengths))
    padded = laid = 0
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        padded += len(batch) * (max(batch) * per_token + max(batch) ** 2 * per_pair)
        # Kernels that know where rows begin do not look at other rows.
        pairs = sum(n * n for n in batch) if "flash" in implementation else sum(batch) ** 2
        laid += sum(batch) * per_token + pairs * per_pair
    return padded / max(laid, 1)


def _head_parameters(model: Any) -> list[Any]:
    head = model.get_output_embeddings()
    return [] if head is None else list(head.parameters())


# Rows laid end to end are the rows alone, up to rounding: relative to the largest logit.
SAME_LOGITS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def why_rows_mix(model: Any, pad_id: int) -> str | None:
    """Try whether rows laid end to end are computed as they are alone.

    Architectures without position ids, with state-space layers or convolutions over tokens carry one row into the
    next. Instead of a list of names, the model itself is run: what stands in the first row must not change the
    second, and the second must be what it is alone.

    Args:
        model: A causal language model of transformers.
        pad_id: As for the trainer's collator.

    Returns:
        None if the rows are independent; otherwise what was seen, a sentence.
    """
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(size, (n,), generator=generator).tolist() for n in (7, 7, 9))
    # A row before and a row behind: what is behind may not leak either.
    collate = DataCollatorForLanguageModeling(pad_token_id=pad_id, padding_free=True)
    device = next(model.parameters()).device
    was_training = model.training

    def run(*rows: list[int]) -> Tensor:
        batch = collate([{"input_ids": row} for row in rows])
        arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items() if k != "labels"}
        return model(**arguments, use_cache=False).logits[0]  # type: ignore[no-any-return]

    model.eval()
    try:
        with torch.inference_mode():
            one = run(first, second, other)[7:16].float()
            two = run(other, second, first)[7:16].float()
            ids = torch.tensor([second], device=device)
            alone = model(input_ids=ids, use_cache=False).logits[0].float()
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0]
        return f"this architecture does not run them end to end ({type(error).__name__}: {reason})."
    finally:
        model.train(was_training)
    largest = alone.abs().max().clamp_min(1e-30)
    seen = float((one - two).abs().max() / largest)
    changed = float((one - alone).abs().max() / largest)
    name = str(next(model.parameters()).dtype).removeprefix("torch.")
    allowed = SAME_LOGITS.get(name, SAME_LOGITS["bfloat16"])
    # The same shapes and the same row: nothing but the order of sums in shared work, such as experts', may differ.
    if not seen <= allowed / 10 or not changed <= allowed:
        return (
            f"laid end to end, one row changes the next in this architecture (logits by {seen:.1e}; against the row "
            f"alone {changed:.1e})."
        )
    return None


def held_out_loss(
    model: nn.Module, examples: Sequence[Encoded], pad_id: int, device: str
) -> Iterator[tuple[float, int, int]]:
    """Sum the negative log-likelihood of the trained tokens, batch by batch.

    Args:
        model: A causal language model; it is put into evaluation mode.
        examples: Encoded examples.
        pad_id: Token to fill short rows with.
        device: Where the model is.

    Yields:
        Per batch: the sum in nats, over how many tokens, of how many examples.
    """
    for _, losses, counts in example_losses(model, examples, pad_id, device):
        yield float(losses.sum()), int(counts.sum()), len(losses)


def example_losses(
    model: nn.Module, examples: Sequence[Encoded], pad_id: int, device: str
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Sum the negative log-likelihood of the trained tokens of each example, batch by batch.

    Args:
        model: A causal language model; it is put into evaluation mode.
        examples: Encoded examples.
        pad_id: Token to fill short rows with.
        device: Where the model is.

    Yields:
        Per batch: where its examples stand in ``examples``, each one's sum in nats, and over how many tokens.
    """
    import torch

    model.eval()
    for chosen in _batches(examples, LOSS_TOKENS):
        batch = [examples[index] for index in chosen]
        length = max(len(e.input_ids) for e in batch)
        ids = torch.full((len(batch), length), pad_id)
        labels = torch.full((len(batch), length), -100)
        mask = torch.zeros((len(batch), length), dtype=torch.long)
        for row, example in enumerate(batch):
            n = len(example.input_ids)
            ids[row, :n] = torch.tensor(example.input_ids)
            labels[row, :n] = torch.tensor(example.labels)
            mask[row, :n] = 1
        arguments = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        sums, counts = row_losses(model, arguments, labels.to(device))
        yield chosen, sums.cpu(), counts.cpu()


def row_losses(model: nn.Module, arguments: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood of the labelled positions of each row, taking logits nowhere else if possible.

    Args:
        model: A causal language model, or PEFT's around it.
        arguments: What it takes: ``input_ids``, ``attention_mask``, ``(rows, length)``, and whatever else.
        labels: Token ids, -100 where nothing is trained, ``(rows, length)``.

    Returns:
        The sums in nats, float64, and over how many tokens, ``(rows,)`` each.
    """
    import torch
    from torch.nn import functional as F

    base = unwrapped(model)
    targets = labels[:, 1:]
    trained = targets != -100  # (rows, length - 1)
    with torch.inference_mode():
        if logits_are_plain(base):
            hidden = base.base_model(**arguments, use_cache=False).last_hidden_state[:, :-1]
            head, rows = base.get_output_embeddings(), hidden[trained]  # (tokens, d)
        else:
            logits = model(**arguments, use_cache=False).logits[:, :-1]
            head, rows = (lambda found: found), logits[trained]  # (tokens, vocabulary)
        parts = zip(torch.split(rows, LOGIT_ROWS), torch.split(targets[trained], LOGIT_ROWS), strict=True)
        losses = [F.cross_entropy(head(row).float(), target, reduction="none") for row, target in parts]
    sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    for_rows = torch.cat(losses).double() if losses else sums[:0]  # (tokens,)
    sums.index_add_(0, trained.nonzero()[:, 0], for_rows)
    return sums, trained.sum(dim=1)


def _batches(examples: Sequence[Encoded], tokens: int) -> Iterator[list[int]]:
    """Group examples of like length, by their place, so that rows × longest row stays within ``tokens``."""
    batch: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids)):
        if batch and (len(batch) + 1) * len(examples[index].input_ids) > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    device: str,
) -> list[str]:
    """Generate greedily.

    Args:
        model: A causal language model; it is put into evaluation mode.
        tokenizer: To turn ids into text.
        prompts: Token ids, one list each.
        max_new_tokens: Tokens at most.
        stop_ids: Tokens that end an answer.
        pad_id: Token to fill short rows with, on the left.
        device: Where the model is.

    Returns:
        The answers' texts, without special tokens and outer white space.
    """
    import torch
    from transformers import GenerationConfig

    model.eval()
    length = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros((len(prompts), length), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, length - len(prompt) :] = 1
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=pad_id
    )
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
    return [str(text).strip() for text in tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)]
