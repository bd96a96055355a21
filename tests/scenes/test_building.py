from dataclasses import replace

import pytest
import torch
from datasets import disable_progress_bars
from scenes.recipe import RECIPE

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaForConditionalGeneration
from voco_llama_hf.scenes.building import add_tokens, build_model, build_processor, enlarge_positions, grid_waves
from voco_llama_hf.scenes.canvas import LARGE, SMALL
from voco_llama_hf.scenes.moving import WORDS, make_clips
from voco_llama_hf.scenes.objects import COLOURS, SHAPES
from voco_llama_hf.scenes.recipe import SCENES_64, SCENES_576
from voco_llama_hf.scenes.still import make_scene, make_scenes


disable_progress_bars()


@pytest.fixture(scope="module")
def processor():
    return build_processor(replace(RECIPE, num_train_scenes=400))


@pytest.fixture(scope="module")
def model(processor):
    return build_model(processor, RECIPE).eval()


def render(processor, messages, **kwargs):
    return processor.apply_chat_template(messages, tokenize=False, **kwargs)


@pytest.mark.parametrize("text", ["Where is the red star?", "grüß dich, 世界 🙂", "a\n\n b\t<c>", "Straße 12345"])
def test_any_text_survives_the_tokenizer(processor, text):
    ids = processor.tokenizer(text).input_ids
    assert ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_words_of_the_scenes_are_single_tokens(processor):
    tokenizer = processor.tokenizer
    assert len(tokenizer) <= 512
    words = [
        *COLOURS,
        *SHAPES,
        *" ".join(SMALL.positions).split(),
        *map(str, range(10)),
        "digits",
        "objects",
        "larger",
    ]
    for word in words:
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word
    assert len(tokenizer("\n", add_special_tokens=False).input_ids) == 1


def test_special_tokens_are_single_tokens(processor):
    tokenizer = processor.tokenizer
    for token in ("<pad>", "<s>", "</s>", "<image>", "<voco>"):
        assert tokenizer(token, add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids(token)]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")


def test_template_renders_parts_and_plain_strings_alike(processor):
    parts = [{"type": "image"}, {"type": "text", "text": "Where is the star?"}]
    expected = "<image>\nWhere is the star?\n"
    for content in (parts, "<image>\nWhere is the star?"):
        messages = [{"role": "user", "content": content}]
        assert render(processor, messages) == expected
        assert render(processor, messages, add_generation_prompt=True) == expected
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "center"}]}]
    conversation = [{"role": "user", "content": parts}, *answer, {"role": "user", "content": "And?"}]
    assert render(processor, conversation) == expected + "center</s>And?\n"


def test_template_starts_text_with_bos(processor):
    assert render(processor, [{"role": "user", "content": "Hello"}]) == "<s>Hello\n"


def test_images_of_any_size_are_resized(processor):
    image = make_scene("train", 0)["image"].convert("L").resize((200, 90))
    inputs = processor(images=image, text="<image>\nWhere is the star?\n", num_voco_tokens=2, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert inputs["input_ids"][0, :2].tolist() == [processor.tokenizer.convert_tokens_to_ids("<voco>")] * 2


def test_model_fits_the_processor(processor):
    model = build_model(processor, SCENES_64)
    assert 3e6 < model.num_parameters() < 6e6
    assert model.config.voco_token_id == processor.tokenizer.convert_tokens_to_ids("<voco>")
    assert model.config.vision_prefix_token_ids == [processor.tokenizer.bos_token_id]
    assert processor.tokenizer.decode(model.config.vision_suffix_token_ids) == "\n"


def test_words_of_videos_become_tokens():
    """Without a change to what is said of images."""
    processor = build_processor(replace(RECIPE, num_train_scenes=400))
    texts = [text for scene in make_scenes("train", 200) for text in (*scene["questions"], scene["description"])]
    before = processor.tokenizer(texts).input_ids
    add_tokens(processor, WORDS)
    assert processor.tokenizer(texts).input_ids == before
    clips = make_clips("train", 40)
    said = [text for clip in clips for text in (*clip["questions"], *clip["answers"], clip["description"])]
    ids = processor.tokenizer(said).input_ids
    assert set(processor.tokenizer.convert_tokens_to_ids(list(WORDS))) <= {id for row in ids for id in row}
    assert processor.batch_decode(ids, skip_special_tokens=True) == said


@pytest.fixture(scope="module")
def started():
    """A model and its processor that start from the embedded checkpoint and read a larger canvas."""
    processor = build_processor(SCENES_576)
    return build_model(processor, SCENES_576).eval(), processor


def test_a_larger_canvas_starts_from_the_embedded_checkpoint(started):
    model, processor = started
    known = VoCoLlamaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        if not name.endswith("position_embedding.weight"):
            torch.testing.assert_close(weight[: len(known[name])], known[name])
    scene = make_scene("train", 3, dense_share=1.0, canvas=LARGE)
    inputs = processor(images=scene["image"], text="<image>\nWhere?\n", num_voco_tokens=2, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 192, 192)
    assert model.model.get_vision_features(inputs["pixel_values"]).shape == (1, 576, 256)
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_places_of_a_larger_canvas_are_few_tokens(started):
    _, processor = started
    for text in (*LARGE.positions, f"What colour is at {LARGE.at(7)}?"):
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) <= 4 or text.startswith("What")
        assert processor.tokenizer.decode(ids) == text


def test_enlarged_positions_keep_their_places():
    """A field that rises along rows and columns rises alike on a finer grid."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    positions = torch.cat([torch.full((1, 2), -5.0), torch.stack([rows.flatten(), columns.flatten()], dim=1)])
    enlarged = enlarge_positions(positions, 24)
    assert enlarged.shape == (577, 2) and enlarged[0].tolist() == [-5, -5]
    grid = enlarged[1:].view(24, 24, 2)
    middles = (torch.arange(24) + 0.5) / 3 - 0.5
    inner = slice(6, 18)
    torch.testing.assert_close(grid[inner, 12, 0], middles[inner], atol=0.05, rtol=0)
    torch.testing.assert_close(grid[12, inner, 1], middles[inner], atol=0.05, rtol=0)


def test_same_seed_builds_the_same_model(processor, model):
    other = build_model(processor, RECIPE)
    assert all(torch.equal(p, other.state_dict()[name]) for name, p in model.state_dict().items())


def test_grid_waves_tell_all_places_apart():
    waves = grid_waves(8, 192)
    assert waves.shape == (64, 192)
    assert torch.cdist(waves, waves).fill_diagonal_(torch.inf).min() > 0.5
    # Neighbours in a row differ in the columns' half alone
    assert torch.equal(waves[0, :96], waves[1, :96]) and torch.equal(waves[0, 96:], waves[8, 96:])
