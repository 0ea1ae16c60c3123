"""Are our rules for answers to picture benchmarks VLMEvalKit's own? Its functions are run beside ours.

VLMEvalKit pins some sixty packages, so its wheel is unpacked, not installed, and the functions are run out of its
files:

    pip download --no-deps ms-vlmeval==0.0.20 && unzip -d KIT ms_vlmeval-0.0.20-py3-none-any.whl
    python benchmarks/vlm_rules.py KIT [--answers N] [--golden FILE] [--out FILE]

Answers are drawn from the pieces that the rules look at: option letters, articles, yes and no, numbers, contractions,
punctuation, option texts, Chinese. ``--golden`` writes the fixed cases of the tests.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import RESULTS, header, write

from moslora.evaluation.benchmarks import rules

WORDS = (
    "A B C D E F Z a the an yes no Yes No YES. none one two 3 1,000 1.5 . , ; ( ) ** * the answer is cat dog red "
    "blue None Option: A. B) (C) [D] {E} couldnt've its dont I'm .. -5% 5% 12 0.05 o'clock / \\ - _ @ ` ? ! “ 中 文 是 "
    "# sorry"
)
PIECES = [*WORDS.split(), "\n", "\t", "Cannot determine the answer"]
OPTIONS = ("cat", "dog", "red car", "blue", "None", "A", "3", "1.5 cm", "a cat and a dog", "中文")
FILES = {
    "choice": ("utils/matching_util.py", ("can_infer_option", "can_infer_text", "can_infer")),
    "yes-no": ("dataset/utils/yorn.py", ("YOrN_Extraction",)),
    "texts": (
        "dataset/utils/vqa_eval.py",
        (
            "_process_digit_article",
            "hit_calculate",
            "relaxed_correctness",
            "levenshtein_distance",
            "anls_compute",
            "process_answer",
            "process_line",
        ),
    ),
    "words": ("smp/misc.py", ("process_punctuation", "istype")),
}
METHODS = {
    "vqa": ("vqa_score", "TextVQA"),
    "anls": ("anls", "DocVQA"),
    "relaxed": ("relaxed_accuracy", "ChartQA"),
}


def kits_functions(kit: Path) -> dict[str, Any]:
    """Run the definitions of the functions that are compared, and nothing else of the kit."""
    import copy
    import os
    import string
    from typing import Optional

    import numpy as np

    space: dict[str, Any] = {
        "re": re,
        "cp": copy,
        "os": os,
        "np": np,
        "string": string,
        "Optional": Optional,
        "listinstr": lambda parts, text: any(part in text for part in parts),
    }
    for name, wanted in FILES.values():
        tree = ast.parse((kit / "vlmeval" / name).read_text(encoding="utf-8"))
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
        assert {node.name for node in found} == set(wanted), f"{name} has other functions in this version"
        module = types.ModuleType(name)
        exec(compile(ast.Module(found, []), name, "exec"), space, module.__dict__)
        space |= {key: value for key, value in module.__dict__.items() if not key.startswith("__")}
    return space


def ocr_bench(answer: str, references: list[str], category: str) -> float:
    """What OCRBench.evaluate does with one row (dataset/image_vqa.py); there it is no function."""
    predict = answer
    for reference in references:
        if category == rules.FORMULAS:
            expected = reference.strip().replace("\n", " ").replace(" ", "")
            predict = predict.strip().replace("\n", " ").replace(" ", "")
        else:
            expected = reference.lower().strip().replace("\n", " ")
            predict = predict.lower().strip().replace("\n", " ")
        if expected in predict:
            return 1.0
    return 0.0


def text(draw: random.Random, most: int = 12) -> str:
    """Draw an answer."""
    return draw.choice([" ", "", " ", " "]).join(draw.choice(PIECES) for _ in range(draw.randint(0, most)))


def cases(draw: random.Random, kit: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Draw one case of each rule, with the kit's result."""
    answer = text(draw)
    options = {letter: draw.choice(OPTIONS) for letter in "ABCDEF"[: draw.randint(2, 6)]}
    references = [text(draw, 3) for _ in range(draw.randint(1, 10))]
    if draw.random() < 0.5:
        references[0] = answer
    if draw.random() < 0.2:
        references = [references[0]] * len(references)
    found: dict[str, dict[str, Any]] = {
        "choice": {
            "answer": answer,
            "options": options,
            "result": kit["can_infer"](answer, dict(options)) or rules.UNREAD,
        },
        "yes-no": {
            "answer": answer,
            "result": kit["YOrN_Extraction"](answer).replace("Unknown", rules.UNREAD),
        },
    }
    for name, (method, benchmark) in METHODS.items():
        line = {"answer": repr(references), "prediction": answer}
        result = float(kit["hit_calculate"]([kit["process_line"](line, method=method)], benchmark)[0])
        found[name] = {"answer": answer, "references": references, "result": result}
    category = draw.choice([rules.FORMULAS, "Scene Text-centric VQA"])
    result = ocr_bench(answer, references, category)
    found["contains"] = {"answer": answer, "references": references, "category": category, "result": result}
    return found


OURS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "choice": lambda case: rules.find_choice(case["answer"], case["options"]),
    "yes-no": lambda case: rules.find_yes_or_no(case["answer"]),
    "vqa": lambda case: rules.vqa_accuracy(case["answer"], case["references"]),
    "anls": lambda case: rules.anls(case["answer"], case["references"]),
    "relaxed": lambda case: rules.relaxed_accuracy(case["answer"], case["references"]),
    "contains": lambda case: rules.contains_any(case["answer"], case["references"], case["category"]),
}


def same(ours: Any, theirs: Any) -> bool:
    """Equal, but for the order of a sum."""
    return abs(ours - theirs) < 1e-9 if isinstance(theirs, float) else ours == theirs


def main() -> None:
    """Compare, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kit", type=Path, help="folder with the unpacked wheel")
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--golden", type=Path, help="write the fixed cases of the tests")
    parser.add_argument("--out", type=Path, default=RESULTS / "vlm_rules.json")
    options = parser.parse_args()
    kit = kits_functions(options.kit)
    draw = random.Random(0)
    differ: dict[str, list[Any]] = {name: [] for name in OURS}
    results: dict[str, set[str]] = {name: set() for name in OURS}
    kept: dict[str, list[Any]] = {name: [] for name in OURS}
    for _ in range(options.answers):
        for name, case in cases(draw, kit).items():
            found = OURS[name](case)
            results[name].add(str(case["result"]))
            if not same(found, case["result"]):
                differ[name].append({**case, "ours": found})
            # Few of most draws have a result that tells; the golden cases are half of those.
            rare = case["result"] not in (rules.UNREAD, 0.0)
            if sum((other["result"] not in (rules.UNREAD, 0.0)) == rare for other in kept[name]) < 40:
                kept[name].append(case)
    if options.golden:
        version = next(options.kit.glob("ms_vlmeval-*.dist-info")).name.removesuffix(".dist-info")
        golden = {"source": version, "cases": kept}
        options.golden.write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    rows = {
        name: {
            "answers": options.answers,
            "different": len(differ[name]),
            "distinct results": len(results[name]),
        }
        for name in OURS
    }
    for name, row in rows.items():
        print(f"{name:9} {row['answers']} answers, {row['different']} different", *differ[name][:3])
    question = "Are our rules for answers to picture benchmarks VLMEvalKit's own?"
    write({**header(question, "cpu", rules=rules.RULES_VERSION), "compared": rows}, options.out)
    sys.exit(any(differ.values()))


if __name__ == "__main__":
    main()
