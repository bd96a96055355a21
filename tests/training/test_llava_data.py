import json
import logging

import numpy as np
import pytest
from PIL import Image
from training.sft_helpers import config, losses, noise_image, processor_and_model
from video_files import make_frames, write_video

from voco_llama_hf.training import VoCoSFTTrainer
from voco_llama_hf.training.llava_data import load_llava_data


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        noise_image(rng).save(folder / name)
    (folder / "text.png").write_text("no image")
    write_video(folder / "film.mp4", make_frames(12))
    data = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    return folder


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


GOOD = [
    {"id": 1, "image": "a.png", "conversations": turns("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.")},
    {"id": "two", "image": "b.jpg", "conversations": turns("What is it?\n<image>", "A dog.")},
    {"id": 3, "conversations": turns("Hello\nthere", "Hi.")},
    {"id": 4, "image": ["a.png", "b.jpg"], "conversations": turns("<image><image> Which?", "Both.")},
]
FILM = {"video": "film.mp4", "conversations": turns("<video>\nDoes it brighten?", "Yes.")}
BAD = {
    "no such image": {"image": "none.png", "conversations": turns("<image>", "A.")},
    "is not an image": {"image": "text.png", "conversations": turns("<image>", "A.")},
    "is damaged": {"image": "cut.png", "conversations": turns("<image>", "A.")},
    "a turn is from 'dog', expected human or gpt": {"conversations": [{"from": "dog", "value": "Wau"}]},
    "do not take turns: user, user": {"conversations": turns("a") + turns("b")},
    "it says <image> 2 times, but has 1 images": {"image": "a.png", "conversations": turns("<image><image>", "A.")},
    "it says <image> 0 times, but has 1 images": {"image": "a.png", "conversations": turns("What?", "A.")},
    "it says <video> 0 times, but has 1 videos": {**FILM, "conversations": turns("What?", "A.")},
    "no such video": {**FILM, "video": "none.mp4"},
    "text.png cannot be decoded": {**FILM, "video": "text.png"},
    "it has no conversations": {"image": "a.png"},
    "a turn is no {'from': ..., 'value': ...}: 5": {"conversations": [5]},
}


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_become_messages_and_images(tmp_path, images, suffix):
    rows = list(load_llava_data(write(tmp_path / f"data{suffix}", GOOD), images))
    image, text = {"type": "image"}, lambda value: {"type": "text", "text": value}
    assert [row["messages"][0]["content"] for row in rows] == [
        [image, text("What is it?")],
        [text("What is it?"), image],
        [text("Hello\nthere")],
        [image, image, text("Which?")],
    ]
    assert [[turn["role"] for turn in row["messages"]] for row in rows] == [
        ["user", "assistant"] * n for n in (2, 1, 1, 1)
    ]
    assert [[shown.size for shown in row["images"]] for row in rows] == [[(40, 30)] * n for n in (1, 1, 0, 2)]
    assert all(isinstance(shown, Image.Image) for row in rows for shown in row["images"])


def test_videos_become_frames(tmp_path, images):
    (row,) = load_llava_data(write(tmp_path / "data.json", [FILM]), images, num_frames=4)
    video, text = row["messages"][0]["content"]
    assert text == {"type": "text", "text": "Does it brighten?"} and row["images"] == []
    assert [frame.shape for frame in video["video"]] == [(48, 64, 3)] * 4
    assert all(np.diff([frame[:, :32].mean() for frame in video["video"]]) > 10)


def test_bad_rows_are_reported_by_number_and_left_out(tmp_path, images, caplog):
    rows = [GOOD[0], *BAD.values(), GOOD[1]]
    with caplog.at_level(logging.WARNING):
        read = list(load_llava_data(write(tmp_path / "data.json", rows), images, max_bad_rows=len(BAD)))
    assert len(read) == 2
    for number, message in enumerate(BAD, start=2):
        (line,) = [r.message for r in caplog.records if f"row {number} is left out" in r.message]
        assert message in line, line
        assert f"({number - 1} so far)" in line


def test_too_many_bad_rows_are_an_error(tmp_path, images):
    data = load_llava_data(write(tmp_path / "data.json", [*GOOD, *BAD.values()]), images, max_bad_rows=3)
    with pytest.raises(ValueError, match=r"more than 3 rows of data\.json cannot be read, the last is row 8"):
        list(data)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data.json", "[]", "has no rows: expected a JSON list"),
        ("data.json", '{"a": 1}', "has no rows: expected a JSON list"),
        ("data.jsonl", "", "has no rows: expected JSON lines"),
        ("data.json", "hello", "is damaged behind row 0"),
        ("data.jsonl", "hello", "is damaged behind row 0"),
    ],
)
def test_a_file_of_another_kind_is_an_error_at_once(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_llava_data(tmp_path / name)


def test_a_file_that_breaks_off_is_an_error_where_it_does(tmp_path, images):
    path = write(tmp_path / "data.json", GOOD)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="is damaged behind row 3"):
        list(load_llava_data(path, images))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*data\.json"):
        load_llava_data(tmp_path / "data.json")
    write(tmp_path / "data.json", GOOD)
    with pytest.raises(FileNotFoundError, match=r"no such image folder: .*nowhere"):
        load_llava_data(tmp_path / "data.json", tmp_path / "nowhere")


def test_a_buffer_shuffles_rows_the_same_way_for_the_same_seed(tmp_path, images):
    rows = [{"conversations": turns(str(i), "A.")} for i in range(50)]
    path = write(tmp_path / "data.json", rows)

    def order(seed):
        shuffled = load_llava_data(path, images, shuffle_buffer_size=20, seed=seed)
        return [int(row["messages"][0]["content"][0]["text"]) for row in shuffled]

    assert sorted(order(0)) == list(range(50))
    assert order(0) == order(0) != order(1)
    assert order(0) != list(range(50))


def test_the_stream_trains(tmp_path, images):
    path = write(tmp_path / "data.json", [*GOOD, FILM, BAD["no such image"]])
    processor, model = processor_and_model()
    trainer = VoCoSFTTrainer(
        model,
        config(tmp_path / "out", max_steps=4, num_voco_tokens=[2, 1, 0]),
        train_dataset=load_llava_data(path, images, shuffle_buffer_size=4),
        processing_class=processor,
    )
    trainer.train()
    assert len(losses(trainer)) == 4
