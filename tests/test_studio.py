"""Laws of the studio that need no browser: folders, text, the form, commands, runs, marks, and who may look."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import moslora.studio.jobs
import tiny
from moslora.display import Display
from moslora.errors import DataError, NotFoundError, RecipeError, UsageError
from moslora.recipe.building import build_recipe
from moslora.recipe.field_types import fields_of
from moslora.recipe.keys import MANAGED, UNFIT
from moslora.recipe.loading import load_recipe
from moslora.recipe.schema import RECIPES, SECTIONS_OF
from moslora.recipe.trainer_arguments import trainer_config, trainer_of
from moslora.studio.answers import PageDisplay, error_box, whole
from moslora.studio.context import Studio
from moslora.studio.curves import drawn_once, histogram, run_curve, two_curves
from moslora.studio.form import (
    MISSING,
    fields_of_kind,
    merged_text,
    sections_of,
    to_text,
    value_at,
    with_task,
)
from moslora.studio.jobs import Jobs
from moslora.studio.markup import escape, frame, notice, table
from moslora.studio.recipes import EMPTY
from moslora.studio.runs import Library, Metrics, thinned
from moslora.studio.serving import POLICY, Guard, is_loopback, password_for
from moslora.studio.talks import Talks
from moslora.studio.watching import run_detail, run_list
from moslora.studio.workspace import Workspace
from moslora.training.run_directory import RunDirectory
from moslora.tuner.config import MoSLoRAConfig
from verbs import World

ROOT = Path(__file__).parents[1]
MARKUP = "<img src=x onerror=alert(1)>\x1b[2J\u202e${1+1}{{x}}"


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    (tmp_path / "downloads").mkdir()
    return Studio.of(Workspace.open(tmp_path / "work"), tmp_path / "downloads", EMPTY)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"))


# --- Folders ------------------------------------------------------------------------------------------------


def test_nothing_outside_of_the_folders_is_found_not_even_by_a_link(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text("{}")
    work, other = tmp_path / "work", tmp_path / "other"
    other.mkdir()
    workspace = Workspace.open(work, (other,))
    (work / "link").symlink_to(secret)
    (other / "mine").write_text("x")
    for name in (
        "../secret.jsonl",
        str(secret),
        "link",
        "/etc/passwd",
        "~root",
        "",
        "a\0b",
        "loop/../../secret.jsonl",
    ):
        with pytest.raises(UsageError):
            workspace.find(name)
    assert workspace.find("runs/a") == work.resolve() / "runs/a"
    assert workspace.find(str(other / "mine")) == other / "mine"
    with pytest.raises(UsageError, match="where the studio writes"):
        workspace.new(str(other / "new"))
    (work / "there").mkdir()
    with pytest.raises(UsageError, match="nothing is overwritten"):
        workspace.new("there")


@pytest.mark.parametrize(
    "place",
    [
        "data.train",
        "data.heldout",
        "model.name",
        "model.tokenizer",
        "adapter.start_from",
        "trainer.deepspeed",
    ],
)
def test_a_recipe_that_names_something_outside_is_refused_wherever_it_does(
    place: str, studio: Studio
) -> None:
    section, _, key = place.partition(".")
    for value in ("/etc/hosts", "../x.jsonl", ["train.jsonl", {"path": "/etc/hosts"}]):
        with pytest.raises(UsageError, match=f"{place}.*outside of what this page may read"):
            studio.workspace.check({section: {key: value}})
    studio.workspace.check({section: {key: "train.jsonl"}})


def test_a_prompt_that_begins_with_a_slash_is_not_a_path_and_a_run_goes_nowhere_else(studio: Studio) -> None:
    studio.workspace.check(
        {"task": {"prompts": ["/imagine a cat", "a/b", "…"]}, "model": {"name": "org/base"}}
    )
    with pytest.raises(UsageError, match="outside"):
        studio.recipes.prepared("model: a\ndata: b\noutput: {dir: /tmp}")
    assert studio.recipes.prepared("model: a\n")["output"]["dir"] == str(studio.workspace.root / "runs")


# --- Text stays text ----------------------------------------------------------------------------------------


def test_what_others_wrote_is_shown_and_not_obeyed() -> None:
    shown = [
        escape(MARKUP),
        notice("error", MARKUP, MARKUP),
        table([MARKUP], [[MARKUP]], MARKUP),
        error_box(DataError(MARKUP, [MARKUP, MARKUP], MARKUP)),
        error_box(UsageError(MARKUP)),
        error_box(OSError(2, MARKUP, MARKUP)),
        error_box(KeyError(MARKUP)),
    ]
    display = PageDisplay()
    display.say(MARKUP)
    display.warn(MARKUP)
    display.table(MARKUP, [MARKUP], [[MARKUP]])
    for page in [*shown, display.html]:
        assert "<img" not in page and "\x1b" not in page and "\u202e" not in page and "&lt;" in page
        assert "Traceback" not in page


def test_a_report_inside_the_page_runs_no_script_and_asks_for_nothing() -> None:
    page = frame('<!DOCTYPE html><p>"x"</p><script>1</script>', MARKUP)
    assert 'sandbox=""' in page and "default-src &#x27;none&#x27;" in page and "<script" not in page
    assert page.count("<iframe") == 1 and page.index("DOCTYPE") < page.index("Content-Security-Policy")


def test_the_display_of_a_page_keeps_colors_as_classes() -> None:
    from rich.text import Text

    display = PageDisplay()
    display.show(Text("learned", "bold green"))
    with display.progress("Reading", 2) as progress:
        progress.advance()
        assert "Reading 1/2" in display.html
    assert '<span class="green bold">learned</span>' in display.html and "Reading" not in display.html


# --- The form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RECIPES)
def test_every_key_of_a_recipe_is_in_the_form_and_no_other(kind: str) -> None:
    places = {one.place for group in fields_of_kind(kind).values() for one in group}
    wanted = set()
    for section, info in RECIPES[kind].model_fields.items():
        if section == "adapter":
            own: Any = {*fields_of(MoSLoRAConfig), "start_from"}
        elif section == "trainer":
            own = set(fields_of(trainer_config(trainer_of(kind))))
        elif section in ("mix", "start_from"):
            continue
        else:
            model = (
                info.annotation
                if hasattr(info.annotation, "model_fields")
                else SECTIONS_OF[kind].get(section)
            )
            own = set(model.model_fields) if model is not None else {""}
        refused = UNFIT.get(kind, {}).get(section, {}) if section in ("adapter", "trainer") else {}
        wanted |= {f"{section}.{key}".rstrip(".") for key in own if key not in refused}
    assert places == wanted - {"task.kind"} - set(MANAGED)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_goes_through_the_form_and_its_text_unchanged(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    sections = sections_of(text)
    kind = value_at(sections, "task.kind")
    fields = [one for group in fields_of_kind("text" if kind is MISSING else kind).values() for one in group]
    shown = [one.to_widget(value_at(sections, one.place)) for one in fields]
    assert merged_text(text, sections, fields, shown) == text
    assert sections_of(to_text(sections)) == sections
    for one, widget in zip(fields, shown, strict=True):
        value = value_at(sections, one.place)
        if value is not MISSING:
            back = one.from_widget(widget, value)
            assert back == value or (value is None and back is MISSING)


def changed(text: str, place: str, widget: Any, before: str | None = None) -> str:
    sections = sections_of(text if before is None else before)
    fields = [one for group in fields_of_kind("text").values() for one in group]
    shown = [one.to_widget(value_at(sections, one.place)) for one in fields]
    shown[[one.place for one in fields].index(place)] = widget
    return merged_text(text, sections, fields, shown)


def test_a_change_in_the_form_is_that_change_in_the_text() -> None:
    text = "model: a\ndata: b.jsonl\nadapter: {r: 8}\ntrainer: {max_length: null}\n"
    assert sections_of(changed(text, "adapter.r", "4"))["adapter"] == {"r": 4}
    assert "adapter" not in sections_of(changed(text, "adapter.r", ""))
    assert "trainer" not in sections_of(changed(text, "trainer.max_length", ""))
    assert sections_of(changed(text, "trainer.max_steps", "null"))["trainer"] == {
        "max_length": None,
        "max_steps": None,
    }
    assert sections_of(changed(text, "trainer.learning_rate", "1e-3"))["trainer"]["learning_rate"] == 1e-3
    assert sections_of(changed(text, "data.train", "my: file.jsonl"))["data"]["train"] == "my: file.jsonl"
    assert sections_of(changed(text, "data.train", "[a.jsonl, b.jsonl]"))["data"]["train"] == [
        "a.jsonl",
        "b.jsonl",
    ]
    assert sections_of(changed(text, "model.trust_remote_code", True))["model"]["trust_remote_code"] is True
    with pytest.raises(RecipeError, match=r"adapter\.r"):
        changed(text, "adapter.r", "[")


def test_where_form_and_text_say_different_things_neither_wins_in_silence() -> None:
    before = "model: a\nadapter: {r: 8}\n"
    now = before.replace("8", "16")
    assert changed(now, "adapter.r", "16", before) == now
    with pytest.raises(RecipeError, match=r"adapter\.r is 16 in the text and 4 in the form"):
        changed(now, "adapter.r", "4", before)
    assert sections_of(changed(now, "adapter.lora_alpha", "1", before))["adapter"] == {
        "r": 16,
        "lora_alpha": 1,
    }


def test_another_task_keeps_what_it_has_a_key_for() -> None:
    text = "model: {name: a, tokenizer: t}\ndata: {train: x, template: plain}\ntrainer: {packing: true, max_steps: 3}\n"
    image = sections_of(with_task(text, "image"))
    assert (
        image["model"] == {"name": "a"}
        and image["data"] == {"train": "x"}
        and image["trainer"] == {"max_steps": 3}
    )
    assert image["task"] == {"kind": "image"}


@pytest.mark.parametrize("typed", ["x", "-1", "1.5", "9" * 20, "¹"])
def test_a_number_that_is_none_is_refused(typed: str) -> None:
    with pytest.raises(UsageError, match="must be a whole number"):
        whole(typed, "Rank")
    assert whole(" 12 ", "Rank") == 12 and whole("", "Rank") is None


# --- Recipes and data ---------------------------------------------------------------------------------------


def fill(studio: Studio, rows: int = 24) -> str:
    root = studio.workspace.root
    tiny.save_chat_model(root / "base")
    tiny.save_chat_data(root / "train.jsonl", rows)
    return "model: base\ndata: train.jsonl\ntrainer: {max_steps: 2}\nevaluation: {also: []}\n"


def test_a_look_at_the_data_counts_rows_and_tokens_and_marks_what_is_learned(studio: Studio) -> None:
    text, display = fill(studio), PageDisplay()
    found = studio.recipes.look(text, display)
    task_rows = build_recipe(studio.recipes.check(text)).data.train
    assert Path(task_rows) == studio.workspace.root / "train.jsonl"
    assert found.rows + found.heldout == 24 and len(found.lengths) == found.rows and found.limit == 1024
    assert '<span class="green bold">' in display.html and "svg" in histogram(found.lengths, found.limit)
    assert studio.recipes.models()[-1] == "base" and "train.jsonl" in studio.recipes.data()


def test_bad_lines_are_an_answer_with_number_and_field(studio: Studio) -> None:
    text = fill(studio)
    with (studio.workspace.root / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user"}]}\n{"messages": 3}\n')
    with pytest.raises(DataError) as raised:
        studio.recipes.look(text, PageDisplay())
    box = error_box(raised.value)
    assert "<li>line 25" in box and "content" in box and "<li>line 26" in box and "2 faults" in box


def test_an_upload_is_kept_under_a_name_of_its_own(studio: Studio, tmp_path: Path) -> None:
    source = tmp_path / "..my data;rm.JSONL"
    source.write_text("{}\n")
    assert studio.recipes.take_upload(source) == "data/my-data-rm.jsonl"
    assert studio.recipes.take_upload(source) == "data/my-data-rm-2.jsonl"
    source.write_text("")
    with pytest.raises(UsageError, match="is empty"):
        studio.recipes.take_upload(source)
    assert len(list((studio.workspace.root / "data").iterdir())) == 2


def test_advice_is_taken_by_its_settings(studio: Studio) -> None:
    text = fill(studio) + "adapter: {target_modules: [q_proj]}\n"
    advice = studio.recipes.advise(text)
    pieces = studio.recipes.pieces(advice)
    assert [s for piece in pieces for s in piece.settings] == advice.overrides
    taken = studio.recipes.with_settings(text, advice.overrides)
    assert sections_of(taken)["adapter"]["target_modules"] == "all-linear"
    assert studio.recipes.plan(text).trained > 0


def test_a_recipe_file_means_the_same_on_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{}")
    (folder / "r.yaml").write_text("model: org/base\ndata: rows.jsonl\n")
    made = Studio.of(Workspace.open(tmp_path), tmp_path, EMPTY)
    text = made.recipes.read("recipes/r.yaml")
    assert sections_of(text)["data"]["train"] == "recipes/rows.jsonl"
    assert (
        build_recipe(made.recipes.check(text)).data.train == load_recipe([str(folder / "r.yaml")]).data.train
    )


# --- Commands -----------------------------------------------------------------------------------------------


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_command_is_a_process_of_its_own_that_another_page_finds(studio: Studio) -> None:
    job = studio.jobs.start("nothing", ["train", "no-such.yaml"])
    other = Jobs(studio.workspace)
    assert [one.name for one in other.all()] == [job.name]
    assert os.getsid(job.pid) == job.pid, "a Ctrl-C at the page's terminal would reach it"
    wait_for(lambda: not studio.jobs.find(job.name).is_running)
    wait_for(lambda: studio.jobs.all() and studio.jobs.find(job.name).exit_code is not None)
    ended = other.find(job.name)
    assert ended.exit_code == 2 and "no-such.yaml does not exist" in ended.error and not ended.is_running
    other.forget(ended)
    with pytest.raises(NotFoundError):
        studio.jobs.find(job.name)


def test_nothing_is_started_of_a_recipe_that_is_wrong(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was started")

    monkeypatch.setattr(moslora.studio.jobs.subprocess, "Popen", refuse)
    text = fill(studio)
    for wrong in (
        "",
        "model: base\n",
        text + "lora: {}\n",
        text + "adapter: {rank: 4}\n",
        text.replace("2", "-5"),
    ):
        with pytest.raises(RecipeError):
            studio.recipes.start(wrong)
    with pytest.raises(AssertionError):
        studio.recipes.start(text)


# --- Runs ---------------------------------------------------------------------------------------------------


def make_run(folder: Path, name: str, steps: int = 4, **fields: Any) -> RunDirectory:
    run = RunDirectory.create(folder, name, "model: base\ndata: train.jsonl\n")
    lines = [{"step": n + 1, "loss": 3.0 / (n + 1), "learning_rate": 1e-3} for n in range(steps)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {"trainer": {"max_steps": 10}, "status": "completed", **fields}
    run.update(**fields)
    return run


def test_a_log_is_read_as_it_grows_and_anew_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = Metrics(path)
    assert not log.update() and log.losses == []
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert log.update() and log.losses == [(1, 2.0)]
    with path.open("a") as file:
        file.write('ss": 1.0}\n[1]\nnot json\n{"step": 3, "loss": null, "not_finite": ["loss"]}\n')
    assert log.update() and log.losses == [(1, 2.0), (2, 1.0)] and log.step == 3 and log.lost == 1
    assert not log.update()
    path.write_text('{"step": 1, "loss": 5.0}\n')
    assert log.update() and log.losses == [(1, 5.0)] and log.step == 1


def test_few_points_keep_the_course_and_the_last_value() -> None:
    points = [(n, float(n)) for n in range(100_000)]
    few = thinned(points, 100)
    assert len(few) <= 100 and few[-1] == points[-1] and all(a[0] < b[0] for a, b in itertools.pairwise(few))
    assert thinned(points[:50], 100) == points[:50]


def test_runs_are_seen_with_their_state_wherever_they_were_started(studio: Studio) -> None:
    runs = studio.workspace.root / "deep" / "runs"
    hostile = make_run(runs, "a", metrics={"before": {"loss": 3.0}, "after": {"loss": 1.0}}, remarks=[MARKUP])
    hostile.path.rename(runs / MARKUP)
    gone = make_run(runs, "gone", status="running")
    gone.update(pid=2**22 + 1, process_started=1.0)
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text("{")
    states = {Path(state.name).name: state for state in studio.library.runs()}
    assert states["gone"].status == "ended" and states["broken"].problem
    named = states[MARKUP]
    assert (named.step, named.steps, named.loss) == (4, 10, 0.75)
    page = run_list(list(states.values()), [], "") + "".join(
        run_detail(studio.library, state, None, None) for state in states.values()
    )
    assert "<img" not in page and "held-out loss 3.00 → 1.00" in page and "is damaged" in page
    assert "Go on continues from its last checkpoint" in page and "svg" in page


def test_an_unchanged_run_is_not_read_again_and_a_changed_one_is(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(studio.workspace.runs, "a")
    state = studio.library.run("runs/a")
    monkeypatch.setattr(Library, "_read", lambda *_: pytest.fail("it was read again"))
    assert studio.library.run("runs/a") is state
    monkeypatch.undo()
    run.update(remarks=["new"])
    assert studio.library.run("runs/a").record["remarks"] == ["new"]


def test_curves_are_drawn_once_and_two_runs_are_told_apart_without_color(studio: Studio) -> None:
    logs = []
    for name in ("a", "b"):
        make_run(studio.workspace.runs, name, 30)
        logs.append((name, studio.library.metrics(studio.workspace.runs / name)))
    state = studio.library.run("runs/a")
    assert run_curve(state, logs[0][1]) is run_curve(state, logs[0][1])
    both = two_curves(logs)
    assert "stroke-dasharray" in both and '<li class="second">b</li>' in both


def test_what_grows_is_not_drawn_at_every_look_and_its_end_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, drawn = [100.0], []
    monkeypatch.setattr("moslora.studio.curves.time.monotonic", lambda: clock[0])

    def look(key: int) -> str:
        return drawn_once(("growing", key), lambda width: drawn.append(key) or f"{key}", "slot")  # type: ignore[func-returns-value]

    first = look(1)
    clock[0] += 2
    assert look(2) == first and set(drawn) == {1}
    clock[0] += 10
    assert "2" in look(2) and set(drawn) == {1, 2}


def test_only_runs_below_the_folder_that_do_not_run_are_deleted(studio: Studio, tmp_path: Path) -> None:
    make_run(studio.workspace.runs, "done")
    live = make_run(studio.workspace.runs, "live", status="running")
    live.update(host="elsewhere")  # of another machine, which wrote a moment ago
    outside = make_run(tmp_path / "outside", "other")
    (studio.workspace.runs / "link").symlink_to(outside.path)
    with pytest.raises(UsageError, match="is running"):
        studio.library.delete("runs/live")
    for name in ("runs/link", "../outside/other"):
        with pytest.raises(UsageError, match="outside"):
            studio.library.delete(name)
    with pytest.raises(NotFoundError):
        studio.library.delete("base")
    studio.library.delete("runs/done")
    assert not (studio.workspace.runs / "done").exists() and outside.path.exists()


# --- Marks --------------------------------------------------------------------------------------------------


def test_marks_are_preference_data_that_a_training_reads(world: World, tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path, (world.folder,))
    talks = Talks(workspace)
    talk = talks.open(
        [str(world.native)], str(world.base), Display(quiet=True), "Be brief.", max_new_tokens=6
    )
    *_, last = talk.ask("say 3")
    assert set(last) == {"base", "native"} and last["base"] != last["native"]
    assert talks.mark(talk, 0, "native") == 1 == talks.count_marks()
    row = json.loads(talks.marks.read_text(encoding="utf-8"))
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    replies = {reply.model: reply.text for reply in talk.made.turns[0].replies}
    assert (
        row["chosen"][0]["content"] == replies["native"] and row["rejected"][0]["content"] == replies["base"]
    )
    with pytest.raises(UsageError, match="marked already"):
        talks.mark(talk, 0, "base")
    list(talk.ask("say 4"))
    with pytest.raises(UsageError, match="had given other answers"):
        talks.mark(talk, 1, "native")
    talk.begin_anew()
    list(talk.ask("say 5"))
    talks.mark(talk, 0, "base")
    from moslora.data.files import read_records
    from moslora.data.preferences import to_preferences

    pairs = to_preferences(read_records(str(talks.marks), "train", None), "auto")
    assert len(pairs) == 2


def test_a_closed_page_stops_the_answer_that_it_waits_for(world: World, tmp_path: Path) -> None:
    talks = Talks(Workspace.open(tmp_path, (world.folder,)))
    talk = talks.open([str(world.native)], str(world.base), Display(quiet=True), max_new_tokens=100)
    asking = talk.ask("say 3")
    next(asking)
    asking.close()
    assert talk.made.turns[0].was_interrupted and talk.made.turns[0].replies[0].tokens < 100
    again = talks.open([str(world.native)], str(world.base), Display(quiet=True), max_new_tokens=4)
    assert again.made.subjects is talk.made.subjects, "the models are loaded once"


def test_too_many_or_none_to_talk_to_are_refused(tmp_path: Path) -> None:
    talks = Talks(Workspace.open(tmp_path))
    for names in ([], ["a"] * 4, ["../x"]):
        with pytest.raises(UsageError):
            talks.open(names, "", Display(quiet=True))
    with pytest.raises(UsageError, match="outside"):
        talks.open(["a"], "/etc", Display(quiet=True))


# --- Who may look -------------------------------------------------------------------------------------------


def test_beyond_this_machine_there_is_always_a_password() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3"):
        assert is_loopback(host) and password_for(host, None) == (None, False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        made, is_made = password_for(host, None)
        assert is_made and made is not None and len(made) >= 16 and password_for(host, None)[0] != made
        assert password_for(host, "long enough") == ("long enough", False)
    with pytest.raises(UsageError, match="at least 8"):
        password_for("127.0.0.1", "short")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({b"host": b"127.0.0.1:7860"}, 200),
        ({b"host": b"localhost:7860", b"origin": b"http://localhost:7860"}, 200),
        ({b"host": b"[::1]:7860"}, 200),
        ({b"host": b"evil.example:7860"}, 403),
        ({b"host": b"127.0.0.1:7860", b"origin": b"https://evil.example"}, 403),
        ({b"host": b"127.0.0.1:7860", b"origin": b"null"}, 403),
        ({}, 403),
    ],
)
def test_a_page_of_another_site_is_not_answered(headers: dict[bytes, bytes], status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Any] = []

    async def ask() -> None:
        async def receive() -> Any: ...

        async def send(message: Any) -> None:
            sent.append(message)

        guard = Guard(app, ("127.0.0.1", "localhost", "::1"))
        await guard({"type": "http", "headers": list(headers.items())}, receive, send)

    asyncio.run(ask())
    assert sent[0]["status"] == status
    if status == 200:
        assert (b"content-security-policy", POLICY.encode()) in sent[0]["headers"]


def test_without_gradio_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "from moslora.cli import app; app(['studio', sys.argv[1], '--port', '0'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (
        done.returncode == 2
        and "pip install 'moslora[studio]'" in done.stderr
        and "Traceback" not in done.stderr
    )
