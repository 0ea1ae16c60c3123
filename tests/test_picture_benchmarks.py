"""Picture benchmarks: files, rules, prompts, scores, and an evaluation from end to end on a tiny model."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import benchmark_files
import moslora
import tiny_vision
from moslora.cli import app
from moslora.display import Display
from moslora.distributed import Team
from moslora.errors import DataError, ExistsError, UsageError
from moslora.evaluation.benchmarks import rules
from moslora.evaluation.benchmarks.asking import other_pictures
from moslora.evaluation.benchmarks.evaluate import Wanted, evaluate_benchmarks
from moslora.evaluation.benchmarks.prompts import question_of_item
from moslora.evaluation.benchmarks.scores import Graded, compare_scores
from moslora.evaluation.benchmarks.table import BENCHMARKS, find_benchmark
from moslora.evaluation.benchmarks.tsv import read_benchmark_file, split_record
from moslora.evaluation.judge import Subject
from moslora.recipe.loading import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
GOLDEN = Path(__file__).parent / "golden" / "vlm_rules.json"

# --- Files --------------------------------------------------------------------------------------------------


def test_every_cell_stays_text_and_pictures_stay_in_the_file(tmp_path):
    file = read_benchmark_file(benchmark_files.choices(tmp_path / "MMStar.tsv"))
    assert [item.index for item in file.items] == ["0", "1", "2", "3"]
    assert file.without_picture == 1
    assert file.items[0].options == {"A": "red", "B": "None"}
    assert file.items[1].options == {"A": "1", "B": "2"}, "not 1.0"
    assert file.items[1].cells["question"] == 'A "color"?'
    assert file.items[2].cells["question"] == "Same?\nOr not?"
    assert file.read_as_empty == 2
    assert [item.pictures for item in file.items] == [1, 1, 2, 1]
    shown = [[p.getpixel((3, 3)) for p in file.pictures(item, 1000)] for item in file.items]
    assert shown == [[(255, 0, 0)], [(0, 0, 255)], [(255, 0, 0), (0, 0, 255)], [(255, 0, 0)]]
    held = json.dumps([dataclasses.asdict(item) for item in file.items])
    assert benchmark_files.picture("red") not in held, "no picture is in memory"


def test_cells_are_split_as_pandas_splits_them():
    for record, cells in {
        "a\tb": ["a", "b"],
        '"a\tb"\tc': ["a\tb", "c"],
        '"a""b"\t': ['a"b', ""],
        'a"b\t"c"d': ['a"b', "cd"],
        '""\tx\t"l\nm"': ["", "x", "l\nm"],
    }.items():
        assert split_record(record) == cells


FAULTS = {
    "a reference to nowhere": ({"image": "99"}, "shows the picture of index \"99\", which is not in the file"),
    "a reference to a reference": ({"image": "3"}, "which has no picture of its own"),
    "broken base64": ({"image": "A" * 65 + "*" * 8}, "its picture is not base64"),
    "an index twice": ({"index": 0}, "index \"0\" is also in line 2"),
    "no index": ({"index": ""}, "has no index"),
    "a list that is none": ({"image": "[" + "x" * 80 + "]"}, "is not a list of pictures"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_line_and_index(tmp_path, fault):
    change, message = FAULTS[fault]
    row = {"index": 7, "image": "0", "question": "Which?", "A": "x", "B": "y", "answer": "A", **change}
    path = benchmark_files.choices(tmp_path / "MMStar.tsv")
    lines = path.read_text().splitlines()
    header = lines[0].split("\t")
    path.write_text(path.read_text() + "\t".join(str(row.get(name, "")) for name in header) + "\n")
    with pytest.raises(DataError, match="line ") as caught:
        read_benchmark_file(path)
    assert message in str(caught.value).replace("'", '"')


def test_a_quotation_mark_that_is_never_closed_is_a_fault(tmp_path):
    path = tmp_path / "MMStar.tsv"
    path.write_text('index\tquestion\timage\n1\t"open\t0\n2\tb\t1\n')
    with pytest.raises(DataError, match="line 2: a cell that begins with a quotation mark"):
        read_benchmark_file(path)


def test_an_answer_that_is_not_among_the_options_and_a_rotation_without_its_question_are_refused(tmp_path):
    path = benchmark_files.choices(tmp_path / "MMStar.tsv")
    path.write_text(path.read_text().replace("None\tA", "None\tE"))
    with pytest.raises(UsageError, match="index 0: the answer 'E' is not among the options A, B"):
        find_benchmark(read_benchmark_file(path))


def test_a_file_is_known_by_checksum_else_by_name_else_as_named(tmp_path, monkeypatch):
    path = benchmark_files.circular(tmp_path / "CCBench.tsv")
    file = read_benchmark_file(path)
    assert find_benchmark(file) == (BENCHMARKS["CCBench"], "name")
    answers = read_benchmark_file(benchmark_files.yes_no(tmp_path / "other.tsv"))
    known = dataclasses.replace(answers, md5="b36b43c3f09801f5d368627fb92187c3")
    assert find_benchmark(known) == (BENCHMARKS["MME"], "checksum")
    other = dataclasses.replace(file, path=tmp_path / "mine.tsv")
    assert find_benchmark(other, "circular")[1] == "as named"
    with pytest.raises(UsageError, match=r"mine.tsv is not a benchmark that is known.*--as NAME"):
        find_benchmark(other)
    with pytest.raises(UsageError, match="Did you mean 'MMStar'"):
        find_benchmark(other, "MMStarr")


# --- Rules --------------------------------------------------------------------------------------------------


def test_the_rules_are_vlmevalkits_own_on_fixed_cases():
    """Its functions' results, from benchmarks/vlm_rules.py, which compares ten thousand of each."""
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "choice": lambda c: rules.find_choice(c["answer"], c["options"]),
        "yes-no": lambda c: rules.find_yes_or_no(c["answer"]),
        **{
            name: lambda c, rule=rule: rule(c["answer"], c["references"])
            for name, rule in rules.TEXT_RULES.items()
        },
        "contains": lambda c: rules.contains_any(c["answer"], c["references"], c["category"]),
    }
    assert set(cases["cases"]) == set(found)
    for name, rows in cases["cases"].items():
        assert len(rows) >= 60
        assert len({str(row["result"]) for row in rows}) > 1
        for row in rows:
            assert found[name](row) == pytest.approx(row["result"]), (name, row)


def test_each_prompt_is_the_published_one(tmp_path):
    file = read_benchmark_file(benchmark_files.choices(tmp_path / "MMStar.tsv"))
    asked = question_of_item(BENCHMARKS["MMStar"], file.items[1], "llava")
    assert asked == (
        '<image>\nLook.\nA "color"?\nA. 1\nB. 2\nAnswer with the option\'s letter from the given choices directly.'
    )
    asked = question_of_item(BENCHMARKS["MMStar"], file.items[0], "kit")
    assert asked == (
        "<image>\nQuestion: Which color?\nOptions:\nA. red\nB. None\n"
        "Please select the correct answer from the options above. \n"
    )
    chinese = dataclasses.replace(file.items[0], cells={**file.items[0].cells, "question": "什么颜色?"})
    assert question_of_item(BENCHMARKS["MMStar"], chinese, "llava").endswith("\n请直接回答选项字母。")
    placed = dataclasses.replace(
        file.items[2], cells={"question": "Is <image 1> as <image 2>?", "A": "y", "B": "n"}
    )
    assert question_of_item(BENCHMARKS["MMMU_DEV_VAL"], placed, "kit").startswith(
        "Question: Is <image> as <image>?"
    )
    text = question_of_item(BENCHMARKS["TextVQA_VAL"], file.items[0], "kit")
    assert text == "<image>\nWhich color?\nAnswer the question using a single word or phrase."


# --- Scores -------------------------------------------------------------------------------------------------


def test_a_question_is_right_if_every_rotation_is():
    rows = [Graded(q, q, ("x",), g) for q, g in (("1", 1), ("1", 1), ("2", 1), ("2", 0), ("3", 0))]
    figures, _ = compare_scores("circular", rows, None)
    assert figures[0].base == pytest.approx(100 / 3)
    assert figures[0].units == 3
    assert figures[1].base == pytest.approx(60)


def test_mme_adds_accuracy_and_pictures_of_which_both_answers_are_right():
    rows = [
        Graded("a", "color a", ("color",), 1),
        Graded("a", "color a", ("color",), 1),
        Graded("b", "color b", ("color",), 1),
        Graded("b", "color b", ("color",), 0),
        Graded("c", "code_reasoning c", ("code_reasoning",), 0),
        Graded("c", "code_reasoning c", ("code_reasoning",), 1),
        Graded("d", "other d", ("other",), 1),
    ]
    figures, categories = compare_scores("mme", rows, None)
    by_name = {figure.name: figure.base for figure in (*figures, *categories)}
    assert by_name["MME, of 2800"] == pytest.approx(75 + 50 + 50 + 0)
    assert by_name["perception, of 2000"] == pytest.approx(125)
    assert by_name["reasoning, of 800"] == pytest.approx(50)
    assert by_name["other"] == pytest.approx(200), "a category of its own is shown, and not in the sum"


def test_popes_headline_is_the_f1_of_yes():
    rows = [
        Graded("a", "a", ("adversarial", "random"), 1, "Yes", "Yes"),
        Graded("b", "b", ("random",), 0, "Yes", "No"),
        Graded("c", "c", ("random",), 0, "Z", "Yes"),
    ]
    figures, categories = compare_scores("f1", rows, None)
    # The first row counts in both categories that it names: 2 right of 3 found and 3 expected.
    assert figures[0].base == pytest.approx(100 * 2 * 2 / (3 + 3))
    assert {c.name: round(c.base) for c in categories} == {"adversarial": 100, "random": 50}


def test_an_interval_over_units_covers_and_one_over_rows_would_not():
    """Ten rows of a picture are all right or all wrong: the interval over pictures holds the truth in 95 %."""
    random = torch.Generator().manual_seed(0)
    covered, naive = 0, 0
    for _ in range(60):
        right = (torch.rand(40, generator=random) < 0.5).tolist()
        rows = [Graded(str(u), str(u), (), float(r)) for u, r in enumerate(right) for _ in range(10)]
        found = compare_scores("accuracy", rows, None)[0][0]
        covered += found.base_low <= 50 <= found.base_high
        half = 196 * (0.25 / len(rows)) ** 0.5
        naive += abs(found.base - 50) <= half
    assert covered >= 52
    assert naive < 35


def test_equal_models_differ_by_nothing_and_a_better_one_is_told():
    base = [Graded(str(n), str(n), (), float(n % 2)) for n in range(100)]
    same = compare_scores("accuracy", base, base)[0][0]
    assert (same.difference, same.p) == (0, 1)
    assert same.high == -same.low == pytest.approx(3.7, abs=0.1), (
        "100 units that agree do not prove that all do"
    )
    right = [dataclasses.replace(row, grade=1.0) for row in base[:8]]
    all_fixed = compare_scores("accuracy", [dataclasses.replace(row, grade=0.0) for row in right], right)[0][
        0
    ]
    assert all_fixed.difference == all_fixed.high == 100 and 60 < all_fixed.low < 80, "of 8 rows"
    wrong = [dataclasses.replace(row, unit=str(int(row.unit) // 2), grade=0.0) for row in base]
    nothing = compare_scores("accuracy", wrong, wrong)[0][0]
    assert nothing.base == nothing.base_low == 0 and nothing.base_high > 5, "of 50 pictures, not of certainty"
    better = [dataclasses.replace(row, grade=1.0 if n < 40 else row.grade) for n, row in enumerate(base)]
    found = compare_scores("accuracy", base, better)[0][0]
    assert found.difference == pytest.approx(20)
    assert found.low > 0
    assert found.p < 0.001


# --- From end to end ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with an adapter, and a file of every kind."""
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText

    from moslora import MoSLoRAConfig

    folder = tmp_path_factory.mktemp("world")
    tiny_vision.save_llava(folder / "base")
    torch.manual_seed(0)
    config = MoSLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    benchmark_files.circular(folder / "MMBench_DEV_EN.tsv")
    benchmark_files.choices(folder / "MMStar.tsv")
    benchmark_files.yes_no(folder / "MME.tsv")
    benchmark_files.texts(folder / "TextVQA_VAL.tsv", [str(["red"] * 10), str(["blue"] * 10)])
    benchmark_files.texts(folder / "ChartQA_TEST.tsv", ["5", "blue"])
    benchmark_files.texts(folder / "DocVQA_VAL.tsv", ["['red']", "['blue', 'navy']"])
    benchmark_files.texts(folder / "MMVet.tsv", ["red", "blue"])
    benchmark_files.texts(folder / "DocVQA_TEST.tsv", ["", ""])
    benchmark_files.texts(folder / "OCRBench.tsv", ["['red']", "['blue']"])
    benchmark_files.yes_no(folder / "POPE.tsv")
    benchmark_files.hallusion(folder / "HallusionBench.tsv")
    benchmark_files.math_vista(folder / "MathVista_MINI.tsv")
    return folder


def judged(
    world: Path, out: Path, *names: str, adapter: bool = True, team: Team | None = None, **more: Any
) -> Any:
    recipe: Any = load_recipe(["task=vision", f"model={world / 'base'}", "data=x", "data.heldout=x"])
    wanted = Wanted([world / f"{name}.tsv" for name in names], out, **more)
    subject = Subject(str(world / "base"))
    return evaluate_benchmarks(
        subject, recipe, Display(quiet=True), world / "adapter" if adapter else None, wanted, team=team
    )


def test_every_kind_of_benchmark_runs_from_file_to_score(world, tmp_path, monkeypatch):
    from moslora.tasks.text import generation

    generate = generation.generate

    def shorter(model: Any, tokenizer: Any, inputs: Any, settings: Any, device: str) -> list[str]:
        """A random model never ends its answer."""
        return generate(model, tokenizer, inputs, dataclasses.replace(settings, max_new_tokens=5), device)

    monkeypatch.setattr(generation, "generate", shorter)
    names = [
        "OCRBench",
        "POPE",
        "HallusionBench",
        "MathVista_MINI",
        "MMBench_DEV_EN",
        "MMStar",
        "MME",
        "TextVQA_VAL",
        "ChartQA_TEST",
        "DocVQA_VAL",
        "MMVet",
        "DocVQA_TEST",
    ]
    report = judged(world, tmp_path / "out", *names)
    heads = {r.name: r.figures[0].name if r.figures else None for r in report.results}
    assert heads == {
        "OCRBench": "accuracy",
        "POPE": "F1 of yes",
        "HallusionBench": "aAcc",
        "MathVista_MINI": "accuracy, questions with options",
        "MMBench_DEV_EN": "circular accuracy",
        "MMStar": "accuracy",
        "MME": "MME, of 2800",
        "TextVQA_VAL": "VQA accuracy",
        "ChartQA_TEST": "relaxed accuracy",
        "DocVQA_VAL": "ANLS",
        "MMVet": None,
        "DocVQA_TEST": None,
    }
    assert report.activity is not None and report.activity.effect > 0
    assert report["MMBench_DEV_EN"].figures[0].units == 3
    assert report["MMBench_DEV_EN"].exchanged[0].units == 3
    assert "vlmutil eval" in " ".join(report["MMVet"].notes)
    assert "not in the file" in " ".join(report["DocVQA_TEST"].notes)
    for name in names:
        table = (tmp_path / "out" / name / f"tuned_{name}.tsv").read_text(encoding="utf-8")
        header = table.splitlines()[0].split("\t")
        assert header[-1] == "prediction" and "image" not in header
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "12 items, protocol published" in page and "built-in" not in page
    assert "MMBench_DEV_EN" in page and "data:image/webp" in page and "XTuner" in page
    assert json.loads((tmp_path / "out" / "report.json").read_text())["results"][0]["name"] == names[0]


def test_an_interrupted_evaluation_continues_to_the_same_answers(world, tmp_path, monkeypatch):
    whole = judged(world, tmp_path / "whole", "MMBench_DEV_EN")
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    from moslora.evaluation.benchmarks import asking

    monkeypatch.setattr(asking, "BATCH", 4)
    original = asking.Asker.ask

    def stopped(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args[:5], stop)

    monkeypatch.setattr(asking.Asker, "ask", stopped)
    with pytest.raises(KeyboardInterrupt):
        judged(world, tmp_path / "cut", "MMBench_DEV_EN")
    answers = tmp_path / "cut" / "MMBench_DEV_EN" / "answers.jsonl"
    assert len(answers.read_text().splitlines()) == 1 + 8
    answers.write_bytes(answers.read_bytes()[:-7])  # as a kill in the middle of a line leaves it
    monkeypatch.setattr(asking.Asker, "ask", original)
    again = judged(world, tmp_path / "cut", "MMBench_DEV_EN")
    ours, others = (
        sorted((tmp_path / name / "MMBench_DEV_EN" / "answers.jsonl").read_text().splitlines())
        for name in ("cut", "whole")
    )
    assert ours == others
    assert again.results[0].figures == whole.results[0].figures
    with pytest.raises(ExistsError, match="prompt was 'llava', and is 'kit' now"):
        judged(world, tmp_path / "cut", "MMBench_DEV_EN", prompt="kit")


def test_processes_share_the_items_and_give_the_same_answers(world, tmp_path, monkeypatch):
    """One after the other, as the other has nothing to wait for: each asks its share of what is left."""
    whole = judged(world, tmp_path / "whole", "MMBench_DEV_EN")
    for name in ("wait", "broadcast"):
        monkeypatch.setattr(Team, name, lambda self, value=None: value)
    with pytest.raises(AssertionError, match="the first process made it"):
        judged(world, tmp_path / "shared", "MMBench_DEV_EN", team=Team(rank=1, size=2))
    answers = tmp_path / "shared" / "MMBench_DEV_EN" / "answers-1.jsonl"
    assert len(answers.read_text().splitlines()) == 1 + 6
    again = judged(world, tmp_path / "shared", "MMBench_DEV_EN", team=Team(rank=0, size=1))
    assert again.results[0].figures == whole.results[0].figures


def test_the_likeliest_letter_is_always_an_option(world, tmp_path):
    report = judged(world, tmp_path / "out", "MMStar", "MME", protocol="letter")
    answers = [
        json.loads(line)
        for line in (tmp_path / "out" / "MMStar" / "answers.jsonl").read_text().splitlines()[1:]
    ]
    assert {a["tuned"] for a in answers} <= {"A", "B", "C"}
    assert report["MME"].unread == {}
    with pytest.raises(UsageError, match="letter takes the likeliest option, and TextVQA_VAL has none"):
        judged(world, tmp_path / "other", "TextVQA_VAL", protocol="letter")


@pytest.mark.parametrize("family", ["qwen2_vl", "paligemma"])
def test_letters_and_rows_without_a_picture_are_asked_of_every_family(tmp_path, family):
    tiny_vision.FAMILIES[family](tmp_path / "base")
    path = benchmark_files.choices(tmp_path / "MMStar.tsv")
    assert read_benchmark_file(path).without_picture == 1
    for protocol in ("letter", "published"):
        report = judged(tmp_path, tmp_path / protocol, "MMStar", adapter=False, protocol=protocol)
        assert report.results[0].items == 4


def test_what_the_processor_cuts_off_a_benchmark_s_pictures_is_said(world, tmp_path):
    wide = io.BytesIO()
    Image.new("RGB", (64, 16), "red").save(wide, "PNG")
    row = {
        "index": 0,
        "image": base64.b64encode(wide.getvalue()).decode(),
        "question": "Which?",
        "answer": "A",
    }
    benchmark_files.write(tmp_path / "MMStar.tsv", [{**row, "A": "red", "B": "blue"}])
    for square, notes in (("none", 1), ("pad", 0)):
        recipe = [
            "task=vision",
            f"model={world / 'base'}",
            "data=x",
            "data.heldout=x",
            f"data.square={square}",
        ]
        wanted = Wanted([tmp_path / "MMStar.tsv"], tmp_path / square)
        subject = Subject(str(world / "base"))
        built: Any = load_recipe(recipe)
        report = evaluate_benchmarks(subject, built, Display(quiet=True), None, wanted)
        assert len(report.results[0].notes) == notes, square
        assert all("a part off 1 of 1 pictures" in note for note in report.results[0].notes)


def test_a_base_alone_is_scored_and_a_limit_takes_whole_questions(world, tmp_path):
    report = judged(world, tmp_path / "out", "MMBench_DEV_EN", adapter=False, limit=2, exchange=False)
    assert report.results[0].items == 8
    assert report.results[0].figures[0].units == 2
    assert report.results[0].figures[0].tuned is None
    assert report.results[0].exchanged == []


def test_exchanged_pictures_are_others(world):
    file = read_benchmark_file(world / "MME.tsv")
    others = other_pictures(file.items)
    assert len(others) == len(file.items)
    assert all(others[item.index].shows != item.shows for item in file.items)


def test_nothing_of_the_file_is_changed(world, tmp_path):
    copy = shutil.copytree(world, tmp_path / "world")
    before = {path.name: path.read_bytes() for path in copy.glob("*.tsv")}
    judged(copy, tmp_path / "out", "MMStar", adapter=False)
    assert {path.name: path.read_bytes() for path in copy.glob("*.tsv")} == before


def test_the_command_takes_several_files_and_says_where_everything_is(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [str(world / f"{name}.tsv") for name in ("MMStar", "MME")]
    words = ["evaluate", str(world / "base"), "--adapter", str(world / "adapter"), "--limit", "2"]
    found = CliRunner().invoke(app, [*words, "--benchmark", *files])
    assert found.exit_code == 0, found.output
    text = " ".join(found.output.split())
    assert "MMStar" in text and "MME, of 2800" in text and "difference (95 %)" in text
    assert len(list((tmp_path / "runs").glob("benchmarks-base-*/report.html"))) == 1
    again = CliRunner().invoke(app, [*words, "--benchmark", ",".join(files), "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["results"][0]["name"] == "MMStar"
    for more, message in {
        ("--as", "choice"): "--as names one file",
        ("--protocol", "letters"): "choose from published, letter",
        ("--data", "x.jsonl"): "data is not for benchmarks",
        ("--prompt", "mine"): "choose from llava, kit",
    }.items():
        refused = CliRunner().invoke(app, [*words, "--benchmark", *files, *more])
        assert refused.exit_code == 2 and message in " ".join(refused.output.split()), refused.output
    alone = CliRunner().invoke(app, [*words, "--prompt", "kit"])
    assert alone.exit_code == 2 and "are for benchmarks" in " ".join(alone.output.split())


def test_methods_are_compared_by_a_benchmark_over_seeds(world, tmp_path):
    """Its questions stand where exact match stands otherwise: paired by seed and by question."""
    for name in ("red", "green", "blue", "white", "yellow", "black"):
        (tmp_path / f"{name}.png").write_bytes(base64.b64decode(benchmark_files.picture(name)))
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}]
    rows = [{"image": f"{name}.png", "conversations": turns} for name in ("red", "green", "blue", "white")]
    (tmp_path / "train.json").write_text(json.dumps(rows * 4))
    others = [{**rows[0], "image": f"{name}.png"} for name in ("yellow", "black")]
    (tmp_path / "heldout.json").write_text(json.dumps(others))
    options = {
        "model": str(world / "base"),
        "task": {"kind": "vision"},
        "data": {"train": str(tmp_path / "train.json"), "heldout": str(tmp_path / "heldout.json")},
        "adapter": {"r": 2},
        "trainer": {"max_steps": 1, "per_device_train_batch_size": 2},
        "methods": ["lora", "moslora"],
        "seeds": 2,
        "learning_rates": [1e-2],
        "validation": 2,
        "out": tmp_path / "out",
    }
    found = moslora.compare(benchmark=world / "MMBench_DEV_EN.tsv", **options)
    assert found.verdict.judged_by == "MMBench_DEV_EN"
    assert found.verdict.base_judged is not None
    assert [c.measure for c in found.verdict.contrasts] == ["loss", "exact_match"]
    assert found.verdict.contrasts[1].difference.examples == 3, "questions, not rows"
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*_*_*.json")]
    assert len(cells) == 4 and all(len(cell["correct"]) == 3 for cell in cells)
    assert "MMBench_DEV_EN" in found.report.read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="other benchmark"):
        moslora.compare(benchmark=world / "MME.tsv", **options)
    with pytest.raises(UsageError, match="has no answers"):
        moslora.compare(benchmark=world / "DocVQA_TEST.tsv", **{**options, "out": tmp_path / "other"})
    with pytest.raises(UsageError, match="needs a recipe of task: vision"):
        moslora.compare(
            benchmark=world / "MME.tsv", **{**options, "task": {"kind": "text"}, "out": tmp_path / "other"}
        )


def test_hallusionbench_counts_figures_and_questions_that_are_right_throughout():
    rows = [
        Graded("set", "0", (), 1, keys=("figure 0", "question 0")),
        Graded("set", "1", (), 1, keys=("figure 0", "question 1")),
        Graded("set", "2", (), 1, keys=("figure 1", "question 0")),
        Graded("set", "3", (), 0, keys=("figure 1", "question 1")),
    ]
    figures, _ = compare_scores("hallusion", rows, None)
    assert {f.name: f.base for f in figures} == {"aAcc": 75, "fAcc": 50, "qAcc": 50}


ODD_ROWS = {
    "a letter in lower case": (
        "choice",
        {"index": 1, "A": "x", "B": "y", "answer": "a"},
        "not among the options A, B",
    ),
    "yes in lower case": ("yes-no", {"index": 1, "answer": "yes"}, "'yes' is neither Yes nor No"),
    "an index of words": ("circular", {"index": "one", "A": "x", "B": "y", "answer": "A"}, "no whole number"),
    "an index without parts": (
        "HallusionBench",
        {"index": "7", "answer": "Yes"},
        "parts four to six of the index",
    ),
    "an option that is none": (
        "MathVista_MINI",
        {
            "index": 1,
            "question_type": "multi_choice",
            "choices": "['x', 'y']",
            "answer": "x",
            "answer_option": "C",
        },
        "not one of the letters of its 2 choices",
    ),
    "choices that are no list": (
        "MathVista_MINI",
        {"index": 1, "question_type": "multi_choice", "choices": "x", "answer": "x", "answer_option": "A"},
        "not one of the letters of its 0 choices",
    ),
}


@pytest.mark.parametrize("odd", ODD_ROWS)
def test_a_row_that_no_answer_could_be_right_for_is_refused(tmp_path, odd):
    named, row, message = ODD_ROWS[odd]
    shown = {"image": benchmark_files.picture("red"), "question": "Which?", **row}
    file = read_benchmark_file(benchmark_files.write(tmp_path / "mine.tsv", [shown]))
    with pytest.raises(UsageError, match="line 2") as caught:
        find_benchmark(file, named)
    assert message in str(caught.value)
