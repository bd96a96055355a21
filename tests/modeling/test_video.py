"""Videos: sampled frames in time order, each an image of k VoCo tokens."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from modeling.helpers import build_processor, tiny_model
from PIL import Image
from transformers import pipeline
from transformers.video_utils import load_video
from video_files import make_frames, write_sound, write_video

from voco_llama_hf.videos import read_frames


PROCESSOR = build_processor()
MODEL = tiny_model(voco_token_id=PROCESSOR.image_token_id)
VOCO = PROCESSOR.image_token_id
FRAMES = make_frames(12)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """12 frames at 10 a second."""
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", FRAMES)


def pixels_of(frames) -> torch.Tensor:
    return PROCESSOR.image_processor(frames, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("k", [1, 3])
def test_a_video_is_its_frames(k):
    """Reference: the frames as images."""
    text = "what moves? <image> in <video> or <video>?"
    clips = [FRAMES[:3], FRAMES[5:7]]
    outputs = PROCESSOR(images=IMAGE, videos=clips, text=text, num_voco_tokens=k, return_tensors="pt")
    expected = PROCESSOR(
        images=[IMAGE, *FRAMES[:3], *FRAMES[5:7]],
        text="what moves? <image> in <image><image><image> or <image><image>?",
        num_voco_tokens=k,
        return_tensors="pt",
    )
    assert set(outputs) == set(expected)
    for name in expected:
        torch.testing.assert_close(outputs[name], expected[name])


def test_images_and_videos_stand_in_the_order_of_the_texts():
    outputs = PROCESSOR(
        images=[IMAGE, IMAGE],
        videos=[FRAMES[:2], FRAMES[4:7]],
        text=["<video> then <image>", "nothing", "<image> then <video>"],
        num_voco_tokens=[1, 2, 3, 4, 1, 2, 3],
        padding=True,
        return_tensors="pt",
    )
    picture, clip = pixels_of([IMAGE]), pixels_of(FRAMES)
    torch.testing.assert_close(outputs["pixel_values"], torch.cat([clip[:2], picture, picture, clip[4:7]]))
    assert (outputs["input_ids"] == VOCO).sum(-1).tolist() == [6, 0, 10]


@pytest.mark.parametrize(
    "videos",
    [FRAMES[:4], list(FRAMES[:4]), [FRAMES[:4]], torch.from_numpy(FRAMES[:4]), list(map(Image.fromarray, FRAMES[:4]))],
    ids=["array", "frames", "list of videos", "tensor", "pillow"],
)
def test_what_a_video_can_be(videos):
    outputs = PROCESSOR(videos=videos, text="<video>", return_tensors="pt")
    torch.testing.assert_close(outputs["pixel_values"], pixels_of(list(FRAMES[:4])))
    assert outputs["num_voco_tokens"].tolist() == [1] * 4


def test_files_and_frames_in_one_call(film):
    outputs = PROCESSOR(videos=[FRAMES[:2], film], text="<video><video>", num_frames=2, return_tensors="pt")
    assert outputs["pixel_values"].shape[0] == 4


@pytest.mark.parametrize(
    ("sampling", "indices"),
    [
        ({"num_frames": 3}, [0, 4, 8]),
        ({"fps": 5}, [0, 2, 4, 6, 8, 10]),
        ({"num_frames": 100}, range(12)),
        ({"do_sample_frames": False}, range(12)),
        ({}, [0, 1, 3, 4, 6, 7, 9, 10]),
        ({"videos_kwargs": {"num_frames": 1}}, [0]),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_sampling(tmp_path, suffix, sampling, indices):
    """Reference: transformers' own reader, asked for every frame. Matroska does not say how many it has."""
    film = write_video(tmp_path / f"film.{suffix}", FRAMES)
    decoded, _ = load_video(str(film), sample_indices_fn=lambda metadata: range(12))
    assert np.abs(decoded.astype(int) - FRAMES).max() < 30  # the codecs lose something
    outputs = PROCESSOR(videos=film, text="<video>", return_tensors="pt", **sampling)
    torch.testing.assert_close(outputs["pixel_values"], pixels_of([decoded[index] for index in indices]))
    if "videos_kwargs" not in sampling and sampling:
        sampling = {name: value for name, value in sampling.items() if name != "do_sample_frames"}
        read = list(read_frames(film, **sampling))
        assert np.array_equal(read, decoded[list(indices)])


def test_a_list_of_frames_is_sampled_when_asked():
    outputs = PROCESSOR(videos=FRAMES, text="<video>", num_frames=3, return_tensors="pt")
    torch.testing.assert_close(outputs["pixel_values"], pixels_of([FRAMES[0], FRAMES[4], FRAMES[8]]))
    assert PROCESSOR(videos=FRAMES, text="<video>", return_tensors="pt")["pixel_values"].shape[0] == 12


def chat(video) -> list[dict]:
    content = [{"type": "video", "video": video}, {"type": "text", "text": "what moves?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("kind", ["path", "frames", "paths of frames"])
def test_a_chat_takes_videos(film, tmp_path, kind):
    pictures = [tmp_path / f"{i}.png" for i in range(3)]
    for picture, frame in zip(pictures, FRAMES):
        Image.fromarray(frame).save(picture)
    video = {"path": str(film), "frames": list(FRAMES[:3]), "paths of frames": list(map(str, pictures))}[kind]
    options = {"num_frames": 3, "num_voco_tokens": 2}
    outputs = PROCESSOR.apply_chat_template(
        chat(video), tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )
    assert (outputs["input_ids"] == VOCO).sum() == 6
    frames = list(FRAMES[:3]) if kind != "path" else list(read_frames(film, 3))
    torch.testing.assert_close(outputs["pixel_values"], pixels_of(frames))


def test_assistant_masks_survive_the_expansion_of_videos():
    conversation = [*chat(FRAMES[:5]), {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]
    conversation[0]["content"].insert(0, {"type": "image", "image": IMAGE})
    options = {
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "return_assistant_tokens_mask": True,
    }
    outputs = PROCESSOR.apply_chat_template(conversation, **options, processor_kwargs={"num_voco_tokens": 3})
    answer = outputs["input_ids"][0][outputs["assistant_masks"][0].bool()]
    assert PROCESSOR.tokenizer.decode(answer).strip() == "a cat"
    cache = MODEL.compress(outputs["pixel_values"], 3)
    cached = PROCESSOR.apply_chat_template(conversation_without_pixels(conversation), **options,
                                           processor_kwargs={"voco_cache": cache})  # fmt: skip
    assert torch.equal(cached["input_ids"], outputs["input_ids"])
    assert torch.equal(cached["assistant_masks"], outputs["assistant_masks"])


def conversation_without_pixels(conversation: list[dict]) -> list[dict]:
    def bare(part: dict) -> dict:
        return {name: value for name, value in part.items() if name in ("type", "text")}

    return [{**message, "content": list(map(bare, message["content"]))} for message in conversation]


def test_pipeline(film, tmp_path):
    MODEL.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    options = {"processor_kwargs": {"num_frames": 4, "num_voco_tokens": 2}, "max_new_tokens": 5}
    answer = pipe(text=chat(str(film)), **options)[0]["generated_text"][-1]["content"]
    inputs = PROCESSOR(
        videos=film, text="<s>user: <video>what moves?assistant: ", num_frames=4, num_voco_tokens=2,
        add_special_tokens=False, return_tensors="pt",
    )  # fmt: skip
    ids = MODEL.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert answer == PROCESSOR.decode(ids, skip_special_tokens=True)


def test_a_cache_stands_for_videos(film):
    """Compressed as it is decoded, a few frames at a time, a video answers as it does from its pixels."""
    inputs = PROCESSOR(videos=film, text="<video>\nwhat moves?", num_frames=7, num_voco_tokens=2, return_tensors="pt")
    cache = MODEL.compress(PROCESSOR.iter_pixel_values(read_frames(film, num_frames=7), batch_size=3), 2)
    assert cache.token_counts == [2] * 7
    torch.testing.assert_close(cache.keys, MODEL.compress(inputs["pixel_values"], 2).keys, atol=1e-5, rtol=1e-4)
    cached = PROCESSOR(text="<video>\nwhat moves?", voco_cache=cache, return_tensors="pt")
    assert torch.equal(cached["input_ids"], inputs["input_ids"])
    assert torch.equal(
        MODEL.generate(**cached, voco_cache=cache, max_new_tokens=5), MODEL.generate(**inputs, max_new_tokens=5)
    )


def test_frames_of_a_cache_are_divided_among_videos():
    cache = MODEL.compress(pixels_of(list(FRAMES[:7])), 1)
    even = PROCESSOR(text="<video> or <image> or <video>", voco_cache=cache)["input_ids"][0]
    uneven = PROCESSOR(text="<video> or <image> or <video>", voco_cache=cache, num_frames=[1, 5])["input_ids"][0]
    for ids, frames in ((even, (3, 1, 3)), (uneven, (1, 1, 5))):
        text = " or ".join("<image>" * number for number in frames)
        assert ids == PROCESSOR(text=text, voco_cache=cache)["input_ids"][0]
    for arguments in ({"text": "<video> <video>"}, {"text": "<video>", "num_frames": 3}):
        with pytest.raises(ValueError, match="do not fit a voco_cache of 7 images"):
            PROCESSOR(**arguments, voco_cache=cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<video> what?"}, "no videos were passed"),
        ({"text": "what?", "videos": FRAMES}, "the text has 0 <video> tokens, but 1 videos were passed"),
        ({"text": "<video>", "videos": [FRAMES, FRAMES]}, "1 <video> tokens, but 2 videos"),
        ({"text": "<video><image>", "videos": FRAMES}, "1 <image> tokens, but no images"),
        ({"text": "<video>", "videos": FRAMES, "num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"text": "<video>", "videos": FRAMES, "fps": 0}, "fps must be above 0, got 0"),
        ({"text": "<video>", "videos": FRAMES, "fps": 2}, "fps needs a video that says how fast it is"),
        ({"text": "<video>", "videos": FRAMES, "fps": 2, "num_frames": 3}, "mutually exclusive"),
        ({"text": "<video>", "videos": 7}, "a video is a path, a list of frames or an array"),
        ({"text": "<video>", "videos": FRAMES, "num_voco_tokens": [1, 2]}, "2 numbers, but there are 12 images"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR(**arguments)


def test_bad_files(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", FRAMES).read_bytes()
    damaged = write_video(tmp_path / "damaged.mkv", FRAMES)
    damaged.write_bytes(damaged.read_bytes()[:300])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video " * 100)
    write_sound(tmp_path / "sound.wav")
    write_video(tmp_path / "still.mp4", FRAMES[:1])
    for name, message in (
        ("empty.mp4", "cannot be decoded as a video"),
        ("half.mp4", "has no video stream"),
        ("text.mp4", "cannot be decoded as a video"),
        ("damaged.mkv", "cannot be decoded as a video"),
        ("sound.wav", "has no video stream"),
        ("still.mp4", "has one frame only: pass it as an image"),
    ):
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            PROCESSOR(videos=tmp_path / name, text="<video>")
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            list(read_frames(tmp_path / name))
    for read in (lambda path: PROCESSOR(videos=path, text="<video>"), read_frames):
        with pytest.raises(FileNotFoundError, match=r"no such video: .*missing\.mp4"):
            read(tmp_path / "missing.mp4")


def test_a_file_that_claims_more_frames_than_it_has(tmp_path):
    """Faststart: the header is whole, the frames behind it are cut off."""
    path = write_video(tmp_path / "cut.mp4", make_frames(40, noise=True), options={"movflags": "faststart"})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 40
    for read in (lambda: PROCESSOR(videos=path, text="<video>"), lambda: list(read_frames(path))):
        with pytest.raises(ValueError, match=r"is damaged|cannot be decoded as a video"):
            read()


def test_compress_reads_an_iterable_as_it_goes():
    seen = []

    def frames():
        for frame in FRAMES:
            seen.append(len(seen))
            yield frame

    batches = PROCESSOR.iter_pixel_values(frames(), batch_size=5)
    assert next(batches).shape == (5, 3, 28, 28) and len(seen) == 5
    assert len(MODEL.compress(batches)) == 7 and len(seen) == 12
    with pytest.raises(ValueError, match="at least one image"):
        MODEL.compress(iter([]))
    with pytest.raises(ValueError, match="one number for all images of an iterable"):
        MODEL.compress(iter([pixels_of(FRAMES[:1])]), [1])
