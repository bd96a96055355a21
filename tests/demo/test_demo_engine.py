"""What the demo does behind its page: answers, measured work, bounds, and files of compressed images."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import make_frames, write_video

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.demo import DemoEngine
from voco_llama_hf.demo.examples import EMBEDDED_EXAMPLES
from voco_llama_hf.scenes.readers import preprocess, uncompressed_reader, voco_reader
from voco_llama_hf.serving import Limits


LIMITS = Limits(max_request_bytes=200_000, max_pixels=1_000_000, max_images=4, max_tokens=8)
FEW, CROWDED, FILM = (example.path for example in EMBEDDED_EXAMPLES)
QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def engine() -> DemoEngine:
    model = VoCoLlamaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, dtype="auto").eval()
    return DemoEngine(model, VoCoLlamaProcessor.from_pretrained(EMBEDDED_CHECKPOINT), LIMITS)


def last(answers):
    *_, answer = answers
    assert answer.is_done
    return answer


@pytest.mark.parametrize("picture", [FEW, CROWDED])
def test_answers_are_those_of_the_evaluation(engine, picture):
    """Which prepares prompts and pixels on its own."""
    questions = [QUESTION, "How many objects are there?", "What shape is red?"]
    pixels = preprocess(engine.processor, {"image": [Image.open(picture)]})
    source, _ = engine.open(str(picture), "me", 1)
    for k in (1, 8):
        expected = voco_reader(engine.model, engine.processor, pixels, k)(questions, [0] * len(questions))
        assert [last(engine.ask(source, k, question)).text for question in questions] == expected
    expected = uncompressed_reader(engine.model, engine.processor, pixels)(questions, [0] * len(questions))
    assert [engine.ask_uncompressed(source, question)[1].text for question in questions] == expected


def test_vision_work_is_done_once(engine):
    source, reading = engine.open(str(FEW), "someone", 2)
    assert reading.spent.vision_ms > 0 and reading.spent.language_ms > 0
    for question in (QUESTION, "Where is the orange circle?"):
        answer = last(engine.ask(source, 2, question))
        assert answer.spent.vision_ms == 0 < answer.spent.language_ms
    assert engine.compress(source, 2).spent.total_ms == 0
    # Another k is another reading; whoever comes next sees nothing of this visit; uncompressed it is work every time
    assert engine.compress(source, 4).spent.vision_ms > 0
    assert engine.open(str(FEW), "someone else", 2)[1].spent.vision_ms > 0
    assert all(engine.ask_uncompressed(source, QUESTION)[1].spent.vision_ms > 0 for _ in range(2))


def test_what_is_forgotten_is_made_again(engine):
    small = DemoEngine(engine.model, engine.processor, LIMITS, image_cache_bytes=0)
    source, _ = small.open(str(FEW), "me", 2)
    answer = last(small.ask(source, 2, QUESTION))
    assert answer.text == "orange" and answer.spent.vision_ms > 0


def test_tokens_and_bytes(engine):
    text = engine.model.config.text_config
    of_a_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2  # bfloat16
    source, reading = engine.open(str(FEW), "me", 4)
    assert (source.num_images, reading.num_tokens, reading.nbytes) == (1, 4, 4 * of_a_token)
    whole, answer = engine.ask_uncompressed(source, QUESTION)
    assert (whole.num_tokens, whole.nbytes) == (64, 64 * of_a_token)
    # 60 tokens more of the picture, and the BOS token in front of them
    assert answer.num_prompt_tokens - last(engine.ask(source, 4, QUESTION)).num_prompt_tokens == 61


def test_a_video_is_its_frames(engine):
    source, reading = engine.open(str(FILM), "me", 2)
    assert (source.kind, source.num_images, len(source.thumbnails), reading.num_tokens) == ("video", 4, 4, 8)
    ways = list(engine.compare(source, "Does the white star move left or right?", (1, 2, 0)))
    assert [answer.text for _, _, answer in ways] == ["right"] * 3
    assert [reading.num_tokens for _, reading, _ in ways] == [4, 8, 256]


def noise(path: Path, side: int) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return path


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "text.png": (lambda path: path.write_text("no picture"), "text.png is not an image"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "empty.jpg is not an image"),
    "broken.png": (lambda path: path.write_bytes(FEW.read_bytes()[:500]), "broken.png is damaged"),
    "heavy.png": (lambda path: noise(path, 300), "heavy.png is too large: .* at most 200,000 are read"),
    "wide.png": (lambda path: Image.new("1", (2000, 501)).save(path), "wide.png is too large: 2000x501"),
    "broken.mp4": (lambda path: path.write_bytes(b"\0" * 999), "broken.mp4 cannot be decoded"),
    "short.mp4": (lambda path: path.write_bytes(FILM.read_bytes()[:900]), "short.mp4 (cannot be decoded|is damaged)"),
    "large.mp4": (
        lambda path: write_video(path, np.zeros((2, 1080, 1920, 3), np.uint8)),
        "large.mp4 is too large: .*1920",
    ),
    "gone.png": (lambda path: None, "gone.png is not here any more"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(engine, tmp_path, name):
    make, message = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        engine.open(str(tmp_path / name), "me", 1)
    assert str(tmp_path) not in str(error.value)


def test_long_videos(engine, tmp_path, monkeypatch):
    film = write_video(tmp_path / "long.mp4", make_frames(40))
    monkeypatch.setattr("voco_llama_hf.demo.sources.VIDEO_PIXELS", 30 * 64 * 48)
    with pytest.raises(ValueError, match=r"long\.mp4 is too long: at most 30 frames of 64x48"):
        engine.open(str(film), "me", 1)


@pytest.mark.parametrize(
    ("question", "message"),
    [("  ", "empty"), ("x" * 501, "too long: 501"), ("<image> What?", "<image>"), ("a <voco> b", "<voco>")],
)
def test_bad_questions(engine, question, message):
    source, _ = engine.open(str(FEW), "me", 1)
    with pytest.raises(ValueError, match=message):
        list(engine.ask(source, 1, question))
    with pytest.raises(ValueError, match=message):
        engine.ask_uncompressed(source, question)


def test_what_does_not_fit_the_window_is_said(engine, monkeypatch):
    source, _ = engine.open(str(FEW), "me", 1)
    monkeypatch.setattr(engine, "window", 40)
    assert last(engine.ask(source, 1, QUESTION)).text == "orange"
    with pytest.raises(ValueError, match=r"does not fit: the prompt has \d+ tokens, the model's window 40"):
        engine.ask_uncompressed(source, QUESTION)


def test_an_abandoned_answer_ends(engine):
    """And does not hold up the next one, however long it could have become."""
    model, unending = engine.model, DemoEngine(engine.model, engine.processor, replace(LIMITS, max_tokens=3000))
    source, _ = unending.open(str(FEW), "me", 1)
    eos = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    try:
        answers = unending.ask(source, 1, QUESTION)
        assert not next(answers).is_done
        answers.close()
        start = time.monotonic()
        unending.limits = LIMITS
        assert last(unending.ask(source, 1, QUESTION)).text.startswith("orange")
        waited = time.monotonic() - start
    finally:
        model.generation_config.eos_token_id = eos
    assert waited < 20  # 3,000 tokens would take minutes


# Files of compressed images


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory) -> Path:
    source, _ = engine.open(str(FEW), "me", 2)
    return engine.save(source, 2, str(tmp_path_factory.mktemp("saved")))


def test_a_saved_file_answers_without_the_picture(engine, saved):
    assert saved.name == "few-k2.safetensors"
    source, reading = engine.open_cache(str(saved), "another")
    assert (source.kind, source.thumbnails, reading.num_tokens, reading.spent.vision_ms) == ("cache", [], 2, 0)
    answer = last(engine.ask(source, 0, QUESTION))
    assert (answer.text, answer.spent.vision_ms) == ("orange", 0)
    with pytest.raises(ValueError, match="holds no picture"):
        engine.ask_uncompressed(source, QUESTION)
    again = engine.save(source, 0, str(saved.parent))
    assert torch.equal(VoCoCache.load(again).keys, VoCoCache.load(saved).keys)


def change(**changes) -> Callable[[VoCoCache], VoCoCache]:
    def changed(cache: VoCoCache) -> VoCoCache:
        parts = {name: getattr(cache, name) for name in ("keys", "values", "token_counts", "fingerprint")}
        return VoCoCache(**{**parts, **{name: make(cache) for name, make in changes.items()}})

    return changed


def of_shape(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[VoCoCache], VoCoCache]:
    return change(keys=lambda cache: make(cache.keys), values=lambda cache: make(cache.values))


FOREIGN_FILES = {
    "another model": (
        change(fingerprint=lambda cache: {**cache.fingerprint, "weights": "0" * 64}),
        "was made by another model than the one shown here: weights is 000",
    ),
    "other layers": (of_shape(lambda states: states[:, :3]), "is damaged: keys of"),
    "integers": (of_shape(lambda states: states.to(torch.int32)), "is damaged: keys of"),
    "not finite": (of_shape(lambda states: states * torch.inf), "not finite"),
    "no images": (
        change(keys=lambda c: c.keys[:0], values=lambda c: c.values[:0], token_counts=lambda c: []),
        "damaged",
    ),
    "no integer": (change(token_counts=lambda cache: [2.0]), "is damaged: its metadata"),
}


@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_foreign_cache_files(engine, saved, tmp_path, kind):
    make, message = FOREIGN_FILES[kind]
    path = tmp_path / "foreign.safetensors"
    make(VoCoCache.load(saved)).save(path)
    with pytest.raises(ValueError, match=message) as error:
        engine.open_cache(str(path), "me")
    assert str(tmp_path) not in str(error.value)


def test_damaged_cache_files(engine, saved, tmp_path):
    content = saved.read_bytes()
    path = tmp_path / "damaged.safetensors"
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    for damaged in (b"", b"text", content[:200], content[:-5], flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^damaged.safetensors is (not a readable|damaged)"):
            engine.open_cache(str(path), "me")
    path.write_bytes(b"\0" * 300_000)
    with pytest.raises(ValueError, match="too large"):
        engine.open_cache(str(path), "me")


def test_a_cache_that_fills_the_window_is_refused(engine, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "window", 6)
    VoCoCache.cat([VoCoCache.load(saved)] * 3).save(tmp_path / "many.safetensors")
    with pytest.raises(ValueError, match=r"many\.safetensors has 6 VoCo tokens, more than the model's window"):
        engine.open_cache(str(tmp_path / "many.safetensors"), "me")
