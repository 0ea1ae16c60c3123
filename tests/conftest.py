"""What every test shares: hypothesis without deadlines, because a first call may compile or import."""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

import moslora.tasks.also
import moslora.training.reload_proof.proof
import warm
from upstream import LEFT_OUT, TESTS, lacking, needs, skip_if_refused_by_transformers

settings.register_profile(
    "moslora", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("moslora")


@pytest.fixture(scope="session", autouse=True)
def proofs_start_warm() -> Generator[warm.Warm]:
    warmed = warm.Warm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moslora.training.reload_proof.proof, "run_script", warmed.run)
        yield warmed
    warmed.end()


@pytest.fixture(scope="session", autouse=True)
def little_general_text() -> Generator[None]:
    """Runs of tests measure a part of the general text, which takes a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moslora.tasks.also, "SHIPPED_FILES", ("questions.jsonl",))
        yield


collect_ignore = [name for name, (_, least) in LEFT_OUT.items() if lacking(least)]

# What older versions say of LoRA, too, and the first ones that do not.
OF_OLDER = (
    ({"transformers": "5", "peft": "0.20"}, "ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
)


def pytest_configure(config: pytest.Config) -> None:
    for least, line in OF_OLDER:
        if lacking(least):
            config.addinivalue_line("filterwarnings", line)


# The files that take longest, so that they begin first and two processes end together.
LONGEST = (
    *(
        "test_team",
        "test_train",
        "test_compare",
        "test_ecosystem",
        "test_kernels",
        "test_at_rest",
        "test_image",
    ),
    *(
        "test_preference",
        "test_matrix",
        "test_plan",
        "test_vision_families",
        "test_vision",
        "test_api",
        "test_confirm",
    ),
    *("test_benchmarks", "test_together", "test_classification", "test_every_verb", "test_fsdp1"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    for item in items:
        for test, case, reason, least in TESTS:
            if test in item.nodeid and case in item.nodeid:
                item.add_marker(needs(reason, **least))


def pytest_collection_finish() -> None:
    """Trainers collect garbage again and again; what the imports have made is not looked through each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    try:
        return (yield)
    except ValueError as error:
        skip_if_refused_by_transformers(error)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    try:
        return (yield)
    except ValueError as error:
        skip_if_refused_by_transformers(error)
        raise


def pytest_report_header() -> list[str]:
    said: dict[str, list[str]] = {}
    for name in collect_ignore:
        said.setdefault(LEFT_OUT[name][0], []).append(name)
    return [f"left out with these versions: {' '.join(names)}: {reason}" for reason, names in said.items()]
