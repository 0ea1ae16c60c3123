"""Write BoolQ's questions as rows of text and label, from the folder that LLM-Adapters publishes.

    python recipes/boolq/prepare.py FOLDER          # that holds train.json and test.json of boolq

The questions come without the passages that answer them, so a model has to know, or to guess from how a question is
asked. Of the test questions a part is kept, evenly spread, so that a run on a CPU measures in a minute.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUESTION = re.compile(
    r"Please answer the following question with true or false, question: (.*)\n\nAnswer format.*", re.DOTALL
)


def rows(file: Path) -> list[dict[str, Any]]:
    """Return the questions of a file with their answers."""
    found = []
    for number, row in enumerate(json.loads(file.read_text(encoding="utf-8")), start=1):
        asked = QUESTION.fullmatch(row["instruction"])
        if asked is None or row["answer"] not in ("true", "false"):
            raise SystemExit(f"{file}, row {number}: is not a question of BoolQ as LLM-Adapters writes them.")
        found.append({"text": asked[1].strip(), "label": row["answer"]})
    return found


def main() -> None:
    """Write both files beside this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with train.json and test.json")
    parser.add_argument("--heldout", type=int, default=1000, help="test questions to keep, evenly spread")
    given = parser.parse_args()
    train, test = (rows(given.folder / f"{split}.json") for split in ("train", "test"))
    seen = {row["text"] for row in test}
    kept = [row for row in train if row["text"] not in seen]
    count = min(given.heldout, len(test))
    heldout = [test[index * len(test) // count] for index in range(count)]
    for name, part in (("train", kept), ("heldout", heldout)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(
            f"{name}.jsonl: {len(part)} questions, {sum(row['label'] == 'true' for row in part)} of them true"
        )
    if len(kept) < len(train):
        print(f"{len(train) - len(kept)} training questions are test questions too, and were left out.")


if __name__ == "__main__":
    main()
