"""Laws of DINO-I, CLIP-I and CLIP-T: what they are means of, and that no other model computes them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import tiny_pipelines
from moslora.errors import ModelError
from moslora.metrics.intervals import mean_interval
from moslora.tasks.image.fidelity import about, find_judge, judge_pictures, paired_change, summarize
from tolerances import COSINE

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(torchvision|fast image processor).*",
    "ignore:__array__ implementation:DeprecationWarning",  # of diffusers' schedulers, by numpy
)
EDGE = 16
MEAN, DEVIATION = [0.48, 0.45, 0.4], [0.27, 0.26, 0.28]


def pictures(count: int, seed: int, size: tuple[int, int] = (EDGE, EDGE)) -> list[Any]:
    draw = numpy.random.default_rng(seed)
    return [Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=numpy.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    words = tiny_pipelines.clip_tokenizer()
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": EDGE,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    words.save_pretrained(folder)
    square = {"height": EDGE, "width": EDGE}
    CLIPImageProcessorPil(
        size={"shortest_edge": EDGE}, crop_size=square, image_mean=MEAN, image_std=DEVIATION
    ).save_pretrained(folder)
    return folder


def vit(folder: Path, pooler: bool) -> Path:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=EDGE,
        patch_size=8,
    )
    torch.manual_seed(1)
    ViTModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    # As DINO's own is written, by an older transformers.
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "ViTFeatureExtractor",
                "image_mean": MEAN,
                "image_std": DEVIATION,
                "resample": 3,
                "size": EDGE,
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit(tmp_path_factory.mktemp("dino"), pooler=False)


def by_hand(image: Any) -> torch.Tensor:
    """Pixels of a picture that has the model's size already: ``(1, 3, EDGE, EDGE)``."""
    values = torch.from_numpy(numpy.asarray(image).copy()).float() / 255
    return ((values - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1)[None]


def cosine(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), two.double()).item())


@torch.no_grad()
def test_scores_are_the_mean_cosines_that_a_computation_by_hand_gives(clip: Path, dino: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer, ViTModel

    made = list(zip(["x one", "x one", "a two"], pictures(3, 0), strict=True))
    real = list(zip(["p", "q"], pictures(2, 1), strict=True))
    found = judge_pictures(find_judge("clip_model", str(clip)), "cpu", made, real)
    found |= judge_pictures(find_judge("dino_model", str(dino)), "cpu", made, real)

    model, vit_ = CLIPModel.from_pretrained(clip), ViTModel.from_pretrained(dino, add_pooling_layer=False)
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    seen, words = {}, {}
    for image in [image for _, image in [*made, *real]]:
        # The whole model at once, as its authors call it, and DINO's class token.
        outputs = model(**tokenizer("x one", return_tensors="pt"), pixel_values=by_hand(image))
        token = vit_(pixel_values=by_hand(image)).last_hidden_state[:, 0]
        seen[id(image)] = {"CLIP-I": outputs.image_embeds, "DINO-I": token}
    for prompt in ("x one", "a two"):
        outputs = model(**tokenizer(prompt, return_tensors="pt"), pixel_values=by_hand(made[0][1]))
        words[prompt] = outputs.text_embeds
    for name in ("CLIP-I", "DINO-I"):
        pairs = {
            (n, original): cosine(seen[id(image)][name], seen[id(other)][name])
            for n, (_, image) in enumerate(made)
            for original, other in real
        }
        score = found[name]
        assert score["pairs"] == 6 and abs(score["mean"] - statistics.fmean(pairs.values())) < COSINE
        means = [
            statistics.fmean(v for (n, _), v in pairs.items() if made[n][0] == prompt)
            for prompt in ("x one", "a two")
        ]
        assert [line["prompt"] for line in score["prompts"]] == ["x one", "a two"]
        assert all(abs(line["mean"] - m) < COSINE for line, m in zip(score["prompts"], means, strict=True))
        low, high = mean_interval(means)  # Student's factor for two prompts is 12.7
        assert (
            abs(score["interval"][0] - low) < 20 * COSINE and abs(score["interval"][1] - high) < 20 * COSINE
        )
        for line, original in zip(score["real"], ("p", "q"), strict=True):
            wanted = statistics.fmean(v for (_, name_), v in pairs.items() if name_ == original)
            assert line["picture"] == original and abs(line["mean"] - wanted) < COSINE
    texts = [cosine(seen[id(image)]["CLIP-I"], words[prompt]) for prompt, image in made]
    assert abs(found["CLIP-T"]["mean"] - statistics.fmean(texts)) < COSINE
    assert found["CLIP-T"]["real"] == []


def test_the_same_pictures_give_one_and_their_order_changes_nothing(clip: Path, dino: Path) -> None:
    same = pictures(1, 3, (20, 33))[0]
    others = pictures(4, 4, (18, 24))
    for key, folder, name in (("clip_model", clip, "CLIP-I"), ("dino_model", dino, "DINO-I")):
        judge = find_judge(key, str(folder))
        one = judge_pictures(judge, "cpu", [("a", same), ("b", same)], [("r", same)])[name]
        assert abs(one["mean"] - 1) < COSINE and all(abs(end - 1) < COSINE for end in one["interval"])
        made = [(f"prompt {n % 2}", image) for n, image in enumerate(others)]
        real = [("r", same), ("s", others[0])]
        forward = judge_pictures(judge, "cpu", made, real)
        backward = judge_pictures(judge, "cpu", made[::-1], real[::-1])
        for score in forward:
            for field in ("mean", "interval", "pairs"):
                assert forward[score][field] == backward[score][field], (score, field)
            assert sorted(map(str, forward[score]["prompts"])) == sorted(map(str, backward[score]["prompts"]))


def test_pictures_of_other_prompts_are_not_compared_with_the_subject(clip: Path) -> None:
    judge = find_judge("clip_model", str(clip))
    made = list(zip(["a photo of x cat", "a photo of an xcat", "a dog"], pictures(3, 0), strict=True))
    real = [("r", pictures(1, 1)[0])]
    found = judge_pictures(judge, "cpu", made, real, lambda prompt: about(prompt, "x"))
    assert [line["prompt"] for line in found["CLIP-I"]["prompts"]] == ["a photo of x cat"]
    assert found["CLIP-I"]["interval"] is None and found["CLIP-T"]["pairs"] == 3
    assert judge_pictures(judge, "cpu", made[1:], real, lambda prompt: about(prompt, "x"))["CLIP-I"] == {}
    assert about("anything", None)


def test_what_clip_cannot_read_to_its_end_is_said(clip: Path) -> None:
    said: list[str] = []
    made = [("abcdefghijklmnop " * 3, pictures(1, 0)[0])]
    judge_pictures(find_judge("clip_model", str(clip)), "cpu", made, [], warn=said.append)
    assert len(said) == 1 and "first 16 tokens" in said[0]


def test_changes_are_taken_prompt_by_prompt() -> None:
    before = summarize([("a", "r", 0.1), ("a", "s", 0.3), ("b", "r", 0.5), ("b", "s", 0.7)])
    after = summarize([("b", "r", 0.6), ("b", "s", 0.8), ("a", "r", 0.5), ("a", "s", 0.3)])
    change = paired_change(before, after)
    assert abs(change["mean"] - 0.15) < COSINE and change["prompts"] == 2
    low, high = mean_interval([0.2, 0.1])
    assert abs(change["interval"][0] - low) < COSINE and abs(change["interval"][1] - high) < COSINE
    assert paired_change({}, after) == {}


def edited(source: Path, place: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    import shutil

    shutil.copytree(source, place)
    config = json.loads((place / "config.json").read_text())
    change(config)
    (place / "config.json").write_text(json.dumps(config))
    return str(place)


@pytest.mark.parametrize(
    ("key", "kind", "said"),
    [
        ("clip_model", "siglip", "SigLIP's cosines"),
        ("clip_model", "clip_text_model", "text half"),
        ("clip_model", "vit", "openai/clip-vit-base-patch32"),
        ("dino_model", "dinov2", "DINOv2 is another model"),
        ("dino_model", "clip", "facebook/dino-vits16"),
        ("dino_model", None, "facebook/dino-vits16"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_its_configuration(
    key: str, kind: str | None, said: str, clip: Path, dino: Path, tmp_path: Path
) -> None:
    base = clip if key == "clip_model" else dino
    other = edited(base, tmp_path / "other", lambda config: config.update(model_type=kind))
    with pytest.raises(ModelError, match=rf"task\.{key}=.*would not be what they are called.*{said}"):
        find_judge(key, other)


def test_a_vision_transformer_trained_on_labels_is_not_taken_for_dino(dino: Path, tmp_path: Path) -> None:
    heads = edited(
        dino, tmp_path / "a", lambda config: config.update(architectures=["ViTForImageClassification"])
    )
    with pytest.raises(ModelError, match="is a ViTForImageClassification, not a ViTModel"):
        find_judge("dino_model", heads)
    judge = find_judge("dino_model", str(vit(tmp_path / "b", pooler=True)))
    with pytest.raises(ModelError, match="not one of DINO's, which have no pooler"):
        judge_pictures(judge, "cpu", [], [])


def test_models_are_called_what_they_are_and_incomplete_folders_are_refused(
    clip: Path, dino: Path, tmp_path: Path
) -> None:
    small = edited(dino, tmp_path / "s", lambda config: config.update(hidden_size=384, patch_size=16))
    assert find_judge("dino_model", small).title == "ViT-S/16"
    base = edited(clip, tmp_path / "b", lambda c: c["vision_config"].update(hidden_size=768, patch_size=32))
    assert find_judge("clip_model", base).title == "ViT-B/32"
    (tmp_path / "s" / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json"):
        find_judge("dino_model", small)
    with pytest.raises(ModelError, match=r"task\.clip_model: .*does not exist"):
        find_judge("clip_model", str(tmp_path / "none"))


def test_a_run_records_its_scores_and_says_which_are_absent(clip: Path, tmp_path: Path) -> None:
    import moslora.training.run
    from moslora.display import Display
    from moslora.training.run import train

    tiny_pipelines.sdxl().save_pretrained(tmp_path / "base")
    (tmp_path / "pics").mkdir()
    for n, image in enumerate(pictures(2, 0, (20, 20))):
        image.save(tmp_path / "pics" / f"{n}.png")
    settings = [
        *("task=image", f"model={tmp_path / 'base'}", f"data={tmp_path / 'pics'}", "data.prompt=a x cat"),
        *("data.resolution=16", "task.inference_steps=2", "task.loss_draws=1", "trainer.max_steps=1"),
        *("task.prompts=[a x cat, a x]", f"task.clip_model={clip}", f"output={tmp_path}/run"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
        patch.setattr(moslora.training.run, "show_result", lambda *_: None)
        run = train(settings, Display(quiet=True))
    record = run.read()
    fidelity = record["fidelity"]
    for stage in ("before", "after"):
        assert fidelity[stage]["absent"] == {"DINO-I": "task.dino_model names no model"}
        assert fidelity[stage]["CLIP-I"]["pictures"] == 2 and fidelity[stage]["CLIP-I"]["pairs"] == 4
        assert fidelity[stage]["CLIP-T"]["model"] == str(clip)
    assert set(fidelity["change"]) == {"CLIP-I", "CLIP-T"}
    assert record["hashes"]["judges"]["clip_model"]["method"] == "sha256"
    page = run.report.read_text()
    assert "DINO-I was not computed: task.dino_model names no model." in page
    assert f"{fidelity['after']['CLIP-I']['mean']:.3f}" in page and "CLIP-I by real picture" in page
    with pytest.raises(ValueError, match=r"task\.clip_model is about pictures of prompts"):
        train([*settings, "task.prompts=[]"], Display(quiet=True))
