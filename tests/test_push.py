"""Laws of push: what goes to the Hub, what stays here, and that nothing of a person's is replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.repocard import metadata_load
from typer.testing import CliRunner

import moslora
from fake_hub import FakeHub, Repository, fake_hub
from moslora.adapters.cards.card import is_ours
from moslora.cli import app
from verbs import World

REPO = "ada/tuned"
# huggingface_hub's own use of its transport.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def lora(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.lora, tmp_path / "lora"))


def test_what_the_hub_has_is_the_adapter_and_loads_as_it(lora: Path, hub: FakeHub, tmp_path: Path) -> None:
    pushed = moslora.push(lora, REPO, base="org/base", private=True).pushed
    assert hub.repositories[REPO].private
    assert pushed.verified == len(pushed.files) == len(hub.files(REPO)) and pushed.commit in str(pushed.url)
    back = tmp_path / "back"
    back.mkdir()
    for name, content in hub.files(REPO).items():
        (back / name).write_bytes(content)
    assert hub.files(REPO)["adapter_model.safetensors"] == (lora / "adapter_model.safetensors").read_bytes()
    assert moslora.export(back, tmp_path / "again").proof.max_relative_error < 1e-6
    card = metadata_load(back / "README.md")
    assert (card["base_model"], card["library_name"]) == ("org/base", "peft")
    assert moslora.inspect(back).to_dict()["modules"] == moslora.inspect(lora).to_dict()["modules"]


def test_nothing_but_the_adapter_leaves_and_no_path_of_this_machine(
    lora: Path, hub: FakeHub, tmp_path: Path
) -> None:
    secrets = ("optimizer.pt", "trainer_state.json", "predictions.jsonl", "train.jsonl", "notes.txt", ".env")
    for name in secrets:
        (lora / name).write_text("secret", encoding="utf-8")
    (lora / "checkpoint-2").mkdir()
    (lora / "checkpoint-2" / "adapter_model.safetensors").write_text("secret", encoding="utf-8")
    pushed = moslora.push(lora, REPO).pushed
    assert not any(b"secret" in content for content in hub.files(REPO).values())
    assert set(pushed.left_out) == {*secrets, "checkpoint-2/"}
    for name, content in hub.files(REPO).items():
        assert str(tmp_path).encode() not in content and str(Path.home()).encode() not in content, name
        assert b"/tmp/" not in content, name


@pytest.mark.parametrize("private", [False, True])
def test_a_public_repository_is_not_called_private(lora: Path, hub: FakeHub, private: bool) -> None:
    hub.repositories[REPO] = Repository(private=False)
    if private:
        with pytest.raises(moslora.UsageError, match="is public"):
            moslora.push(lora, REPO, private=True)
        assert hub.files(REPO) == {}
    else:
        moslora.push(lora, REPO)


def test_a_readme_that_somebody_wrote_stays_here_and_there(lora: Path, hub: FakeHub) -> None:
    hub.repositories[REPO] = Repository(private=False)
    hub.files(REPO)["README.md"] = b"# By hand"
    assert any("stays" in note for note in moslora.push(lora, REPO).pushed.notes)
    assert hub.files(REPO)["README.md"] == b"# By hand"
    (lora / "README.md").write_text("# Mine", encoding="utf-8")
    moslora.push(lora, "ada/other")
    assert hub.files("ada/other")["README.md"] == b"# Mine" and (lora / "README.md").read_text() == "# Mine"


def test_a_card_of_ours_is_replaced_by_the_next_push(lora: Path, hub: FakeHub) -> None:
    moslora.push(lora, REPO)
    first = hub.files(REPO)["README.md"].decode()
    moslora.push(lora, REPO, base="org/base")
    second = hub.files(REPO)["README.md"].decode()
    assert is_ours(first) and is_ours(second) and "org/base" in second and "org/base" not in first


def test_a_branch_is_made_and_main_stays(lora: Path, hub: FakeHub) -> None:
    moslora.push(lora, REPO, revision="trial")
    assert "adapter_config.json" in hub.files(REPO, "trial") and hub.files(REPO) == {}


def test_a_dry_run_asks_nothing_and_lists_what_the_push_uploads(lora: Path, hub: FakeHub) -> None:
    dry = moslora.push(lora, REPO, dry_run=True)
    assert hub.asked == [] and "Nothing was uploaded" in repr(dry)
    assert moslora.push(lora, REPO).pushed.files == dry.pushed.files


def test_an_adapter_that_the_doctor_finds_broken_is_refused_unasked(lora: Path, hub: FakeHub) -> None:
    file = lora / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(moslora.AdapterError, match="moslora doctor finds it not usable"):
        moslora.push(lora, REPO)
    assert hub.asked == []


def test_a_hub_that_stores_something_else_fails_the_proof(lora: Path, hub: FakeHub) -> None:
    hub.spoils.add("adapter_model.safetensors")
    with pytest.raises(moslora.HubError, match="its hash is another"):
        moslora.push(lora, REPO)


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        ("/api/models/ada/tuned", 401, "not accepted"),
        ("repos/create", 403, "may not write"),
        ("/commit/", 409, "at the same moment"),
        ("/preupload/", 403, "uploading to ada/tuned"),
        ("resolve", 403, "reading README.md of ada/tuned"),
        ("lfs-blobs", 403, "may not write"),
        ("paths-info", 404, "is not proven. The Hub refused reading back"),
    ],
)
def test_a_refusal_of_the_hub_is_a_sentence_with_what_to_do(
    lora: Path, hub: FakeHub, where: str, status: int, said: str
) -> None:
    hub.refuse[where] = status
    with pytest.raises(moslora.HubError, match=said):
        moslora.push(lora, REPO)
    if where != "paths-info":
        assert not any(repo.branches["main"] for repo in hub.repositories.values())


def test_without_a_token_or_a_hub_it_says_what_to_do(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub(monkeypatch, token=None) as hub, pytest.raises(moslora.UsageError, match="hf auth login"):
        moslora.push(lora, REPO)
    assert hub.asked == []
    with fake_hub(monkeypatch) as hub:
        pass
    with pytest.raises(moslora.HubError, match="cannot be reached while looking for ada/tuned"):
        moslora.push(lora, REPO)  # the server is gone


@pytest.mark.parametrize("repo", ["tuned", "ada/", "/x/y", "ada/a/b", "ada/a b", "ada/..", "../x"])
def test_a_name_that_is_not_a_repositorys_is_refused(lora: Path, repo: str) -> None:
    with pytest.raises(moslora.UsageError, match="OWNER/NAME"):
        moslora.push(lora, repo)


def test_the_command_lists_files_and_answers_in_json(lora: Path, hub: FakeHub) -> None:
    done = CliRunner().invoke(app, ["push", str(lora), REPO, "--json", "--base", "org/base"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["verified"] == len(told["files"]) and told["commit"]
    config = json.loads(hub.files(REPO)["adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/base"
