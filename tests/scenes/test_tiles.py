"""Large scenes, and the study of what tiles buy on them."""

import numpy as np
import pytest
import torch
from datasets import disable_progress_bars
from PIL import Image
from scenes.recipe import RECIPE

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.modeling.tiles_voco_llama import UNDIVIDED
from voco_llama_hf.scenes.building import build_model, build_processor
from voco_llama_hf.scenes.canvas import SMALL, TILES
from voco_llama_hf.scenes.evaluation import evaluate_scenes
from voco_llama_hf.scenes.objects import SceneObject, render
from voco_llama_hf.scenes.readers import MAX_ANSWER_TOKENS, decode_answers, make_prompts, preprocess, voco_reader
from voco_llama_hf.scenes.retention.tiles import TileStudy, divide_into_tiles, large_recipe, make_arms, run_tile_study
from voco_llama_hf.scenes.single_questions import SingleQuestionCollator
from voco_llama_hf.scenes.still import make_scene, make_scenes


disable_progress_bars()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small checkpoint of one layer that reads 64 pixels."""
    folder = tmp_path_factory.mktemp("start")
    processor = build_processor(RECIPE)
    build_model(processor, RECIPE).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiled(start):
    model, processor = divide_into_tiles(start, TILES)
    return model.eval(), processor


def test_large_scenes_are_the_same_every_time():
    first, again = (make_scene("train", 7, canvas=TILES) for _ in range(2))
    assert first.pop("image").tobytes() == again.pop("image").tobytes() and first == again


@pytest.mark.parametrize("names", [("3", "8"), ("square", "circle")])
def test_what_differs_is_lost_when_scaled_down(names):
    """Two scenes whose answers differ: at full size some of their pixels differ much, and none does in one tile."""
    full, scaled = (
        [
            np.asarray(
                render(
                    np.random.default_rng(0),
                    [SceneObject("white", name, "small", 4, 50, 50, 10, TILES)],
                    "test",
                    TILES,
                ).resize((side, side))
            ).astype(int)
            for name in names
        ]
        for side in (TILES.side, SMALL.side)
    )
    much = 300  # of the 765 between black and white
    assert (np.abs(full[0] - full[1]).sum(-1) > much).sum() >= 4
    assert np.abs(scaled[0] - scaled[1]).sum(-1).max() < much


def test_a_model_that_reads_small_scenes_does_not_read_large_ones():
    model = VoCoLlamaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32).eval()
    processor = VoCoLlamaProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
    small, large = (
        evaluate_scenes(
            model, processor, "test", (8,), False, shuffled=False, limit=24, progress=False, canvas=canvas
        ).accuracy["k=8"]["dense"]
        for canvas in (SMALL, TILES)
    )
    for family in ("shape", "digit"):
        assert small[family] > 0.8 > 0.6 > large[family]


@torch.no_grad()
def test_a_tile_is_read_as_a_small_image_was(start, tiled):
    model, processor = tiled
    small = VoCoLlamaForConditionalGeneration.from_pretrained(start, dtype=torch.float32).eval()
    image = make_scene("test", 0, dense_share=1.0, canvas=TILES)["image"]
    inputs = processor(images=image, return_tensors="pt")
    crops = [image.resize((64, 64), Image.Resampling.BICUBIC)]
    crops += [image.crop((left, top, left + 64, top + 64)) for top in (0, 64) for left in (0, 64)]
    expected = VoCoLlamaProcessor.from_pretrained(start)(images=crops, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"][0], expected, atol=0.03, rtol=0)

    (features,) = model.model.get_vision_features(inputs["pixel_values"], inputs["image_sizes"])
    parts = small.model.get_vision_features(inputs["pixel_values"][0])
    assert features.shape == (64 + 16 * (16 + 1), 256)
    torch.testing.assert_close(features[:64], parts[0])
    # Rows of the whole picture, eight tokens of either tile, with what ends them: at first a newline
    rows = features[64:].view(16, 17, 256)
    torch.testing.assert_close(rows[0, :16], torch.cat([parts[1, :8], parts[2, :8]]))
    torch.testing.assert_close(rows[15, :16], torch.cat([parts[3, 56:], parts[4, 56:]]))
    newline = processor.tokenizer("\n", add_special_tokens=False).input_ids[-1]
    assert (rows[:, 16] == small.get_input_embeddings().weight[newline]).all()


@pytest.mark.parametrize("per_tile", [False, True])
def test_questions_in_a_batch_are_answered_as_each_alone(tiled, per_tile):
    """The collator's rows against the processor's, token by token."""
    model, processor = tiled
    scenes = [make_scene("train", index, questions_per_scene=3, canvas=TILES) for index in range(2)]
    batch = SingleQuestionCollator(processor, 2, per_tile)(scenes)
    assert batch["num_voco_tokens"].tolist() == [2] * (10 if per_tile else 2)
    if per_tile:
        assert {tuple(size) for size in batch["image_sizes"].tolist()} == {UNDIVIDED}
    with torch.no_grad():
        logits = model(**batch, two_stages=True, use_cache=False).logits
    numbers = {"num_voco_tokens_per_tile" if per_tile else "num_voco_tokens": 2}
    for row, scene in enumerate(scenes):
        for turn in range(3):
            messages = scene["messages"][2 * turn : 2 * turn + 2]
            ((prompt, answer),) = [(messages[0]["content"], messages[1]["content"])]
            text = make_prompts(processor, [prompt])[0]
            inputs = processor(
                images=scene["image"], text=text, add_special_tokens=False, return_tensors="pt", **numbers
            )
            with torch.no_grad():
                expected = model(**inputs).logits[0, -1]
            place = ((batch["text_groups"][row] == turn + 1) & (batch["labels"][row] != -100)).nonzero()[0, 0]
            torch.testing.assert_close(logits[row, place - 1], expected, atol=1e-4, rtol=1e-4)
            assert processor.decode(batch["labels"][row, place]).strip()[0] == answer[0]


def test_reading_from_a_cache_of_tiles_is_generating_from_pixels(tiled):
    model, processor = tiled
    scenes = make_scenes("test", 3, canvas=TILES)
    questions, shown = ["Where is the red star?", "How many digits are there?"], [2, 0]
    answers = voco_reader(model, processor, preprocess(processor, scenes), 2, per_tile=True)(questions, shown)
    for question, image, answer in zip(questions, shown, answers):
        inputs = processor(
            images=scenes[image]["image"],
            text=make_prompts(processor, [question])[0],
            num_voco_tokens_per_tile=2,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        assert decode_answers(processor, ids[:, inputs["input_ids"].shape[1] :]) == [answer]


def test_arms_are_compared_at_equal_tokens():
    scaled, one, as_many, every_tile, uncompressed = arms = make_arms(2, 5)
    assert len({arm.folder for arm in arms}) == len({arm.name for arm in arms}) == 5
    assert every_tile.per_tile and every_tile.num_voco_tokens == one.num_voco_tokens == (2,)
    assert as_many.num_voco_tokens == (10,) and set(scaled.num_voco_tokens) == {2, 10, 0}
    assert uncompressed.num_voco_tokens == (0,) and [arm.tiled for arm in arms] == [False, True, True, True, True]


def test_a_micro_study_runs_end_to_end_and_goes_on(start, tmp_path):
    recipe = large_recipe(batch_size=2, num_train_scenes=16, num_validation_scenes=2)
    study = TileStudy(tmp_path, 2, start=start, recipe=recipe)
    arms = make_arms(1, study.num_tiles)
    said = []
    first = run_tile_study(study, arms, "validation", 2, report=said.append, progress=False)
    assert len(said) == 5 and {name: set(one.accuracy) for name, one in first.items()} == {
        "scaled down": {"k=1", "k=5", "uncompressed"},
        "tiles, 1 for the image": {"k=1"},
        "tiles, 5 for the image": {"k=5"},
        "tiles, 1 for every tile": {"k=1"},
        "tiles uncompressed": {"uncompressed"},
    }
    assert all(one.blind.keys() == one.accuracy.keys() for one in first.values())

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert run_tile_study(study, arms, "validation", 2, report=said.append, progress=False) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written

    longer = TileStudy(tmp_path, 2, rounds=2, start=start, recipe=recipe)
    weights = [
        VoCoLlamaForConditionalGeneration.from_pretrained(longer.trained(arms[3], number)).state_dict()
        for number in (0, 1, 2)
    ]
    tower = "model.vision_tower.embeddings.patch_embedding.weight"
    assert all(torch.equal(weights[0][tower], later[tower]) for later in weights)
    heads = [part["lm_head.weight"] for part in weights]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    assert {path: path.stat().st_mtime_ns for path in written} == written
