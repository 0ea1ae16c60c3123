"""Laws of the demo's data: what is committed is what the generator says, and the two splits share nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

HOME = Path(__file__).parent.parent / "recipes" / "home"
SPLITS = ("train", "heldout")


def _load_generator(name: str = "generate") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"home_{name}", HOME / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


home = _load_generator()
EXAMPLES = {split: list(home.generate(split)) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_the_committed_file_is_what_the_generator_writes(split: str, tmp_path: Path) -> None:
    home.write(tmp_path)
    assert (tmp_path / f"{split}.jsonl").read_bytes() == (HOME / f"{split}.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout.jsonl", "train.jsonl"]


def test_there_are_enough_examples() -> None:
    assert len(EXAMPLES["train"]) >= 1200
    assert len(EXAMPLES["heldout"]) >= 200


def test_every_prefix_of_heldout_is_a_fair_sample_of_the_kinds() -> None:
    examples, turns = EXAMPLES["heldout"], home.HELDOUT_TURNS
    assert {example.kind for example in examples} == {*home.KINDS, "new-name"}
    for end in range(len(turns), len(examples) + 1, len(turns)):
        counts = Counter(example.kind for example in examples[:end])
        assert counts == Counter(turns * (end // len(turns)))


def test_no_request_occurs_twice() -> None:
    requests = [
        re.sub(r"\W+", " ", example.request).lower() for split in SPLITS for example in EXAMPLES[split]
    ]
    assert len(requests) == len(set(requests))


def test_no_wording_is_shared_by_the_tables_of_the_two_splits() -> None:
    for slot, (train, heldout) in home.WORDINGS.items():
        assert train and heldout
        assert not set(train) & set(heldout), slot
    assert sum(len(train) for train, _ in home.WORDINGS.values()) >= 60


def test_wordings_and_slot_combinations_of_heldout_never_occur_in_training() -> None:
    train, heldout = EXAMPLES["train"], EXAMPLES["heldout"]
    for part in ("wordings", "pairs"):
        seen = set().union(*(getattr(example, part) for example in train))
        asked = set().union(*(getattr(example, part) for example in heldout))
        assert seen and asked and not seen & asked
    assert not {example.answer for example in train} & {example.answer for example in heldout}


def test_what_an_example_says_it_was_made_of_is_what_its_text_contains() -> None:
    """The disjointness above is only worth something if the record of pairs is complete."""
    for example in EXAMPLES["train"] + EXAMPLES["heldout"]:
        assert {(command.what, command.room) for command in example.commands} <= example.pairs
        for what, room in example.pairs:
            assert what in example.request and room in example.request
        assert example.wordings


def test_heldout_names_every_known_device_and_room_that_it_uses_from_training() -> None:
    """Only ``new-name`` may need a name that training never showed."""
    for position in (0, 1):
        known = {pair[position] for example in EXAMPLES["train"] for pair in example.pairs}
        for example in EXAMPLES["heldout"]:
            if example.kind != "new-name":
                assert {pair[position] for pair in example.pairs} <= known


def test_new_names_never_occur_in_training() -> None:
    devices = [name for names in home.NEW_FAMILIES.values() for name in names]
    text = (HOME / "train.jsonl").read_text(encoding="utf-8")
    for name in (*devices, *home.NEW_ROOMS, *home.NEW_PEOPLE):
        assert not re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE), name
    new = {*devices, *home.NEW_ROOMS, *(f"{person}'s room" for person in home.NEW_PEOPLE)}
    for example in EXAMPLES["heldout"]:
        named = {name for pair in example.pairs for name in pair}
        assert bool(named & new) == (example.kind == "new-name")


@pytest.mark.parametrize("split", SPLITS)
def test_every_line_is_a_conversation_with_canonical_json_of_the_schema(split: str) -> None:
    condition = r"(no )?(rain|wind)|(not )?dark|nobody home|[A-Z][a-z]+ (home|away)|(below|above) \d\d"
    actions = {"on", "off", "open", "close", "lock", "unlock", "set", "up", "down"}
    schema = {
        "if": lambda value: re.fullmatch(condition, value) is not None,
        "at": lambda value: re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value) is not None,
        "after": lambda value: isinstance(value, int) and 5 <= value <= 180,
        "for": lambda value: isinstance(value, int) and 5 <= value <= 180,
        **{action: lambda value: value in home.FAMILY_OF for action in sorted(actions)},
        "in": lambda value: isinstance(value, str) and value != "",
        "to": lambda value: isinstance(value, int) and 5 <= value <= 100,
        "by": lambda value: isinstance(value, int) and 1 <= value <= 40,
    }
    for line in (HOME / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        assert set(example) == {"messages", "kind"}
        assert [message["role"] for message in example["messages"]] == ["system", "user", "assistant"]
        answer = example["messages"][-1]["content"]
        commands = json.loads(answer)
        assert answer == json.dumps(commands, separators=(",", ":"))
        assert 1 <= len(commands) <= 3
        for command in commands:
            keys = list(command)
            assert len(actions & set(keys)) == 1 and "in" in keys
            assert keys == sorted(keys, key=list(schema).index)
            assert all(schema[key](value) for key, value in command.items()), command
            assert ("to" in command) == ("set" in command)
            assert ("by" in command) == ("up" in command or "down" in command)


def test_requests_read_as_sentences() -> None:
    for example in EXAMPLES["train"] + EXAMPLES["heldout"]:
        request = example.request
        assert request[0].isupper() or request[0].isdigit()
        assert request[-1] in ".?!"
        assert not re.search(r"[{}]|  | [.,?]|\bNone\b", request), request


def test_a_time_said_aloud_has_one_meaning() -> None:
    meanings: dict[str, tuple[int, int]] = {}
    for hour in range(24):
        for minute in range(0, 60, 5):
            for seed in range(20):
                said = home.say_time(home.random.Random(seed), hour, minute)
                assert meanings.setdefault(said, (hour, minute)) == (hour, minute), said


def test_a_duration_said_aloud_has_one_meaning() -> None:
    meanings: dict[str, int] = {}
    for minutes in home.MINUTES:
        said = home.say_duration(minutes)
        assert meanings.setdefault(said, minutes) == minutes, said


def test_the_examples_in_the_readme_are_in_the_files() -> None:
    text = (HOME / "README.md").read_text(encoding="utf-8")
    by_request = {example.request: example for split in SPLITS for example in EXAMPLES[split]}
    shown = re.findall(r"^user +(.+)\nassistant +(.+)$", text, re.MULTILINE)
    assert shown
    for request, answer in shown:
        assert by_request[request].answer == answer
    kinds = re.findall(r"^\| `([a-z-]+)` \| [^|]+ \| ([A-Z][^|]+) \|$", text, re.MULTILINE)
    assert [kind for kind, _ in kinds] == [*home.KINDS, "new-name"]
    for kind, request in kinds:
        assert by_request[request].kind == kind


def test_the_committed_pairs_are_what_their_generator_writes() -> None:
    pairs = _load_generator("preferences")
    for split, count in (("train", pairs.TRAIN), ("heldout", pairs.HELDOUT)):
        lines = (HOME / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = [pairs.pair(line, number) for number, line in enumerate(lines)]
        kept = (HOME / f"pairs-{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in kept] == rows
        for line, row in zip(lines, rows, strict=True):
            [chosen], [rejected] = row["chosen"], row["rejected"]
            assert chosen == json.loads(line)["messages"][-1] and rejected["content"] != chosen["content"]
        assert sum(row["kind"] == "prose" for row in rows) == count // 4
