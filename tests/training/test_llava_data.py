import json
import logging
import os
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from datasets import disable_progress_bars
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from training.sft_helpers import config, losses, noise_image, processor_and_model
from video_files import make_frames, write_video

from voco_llama_hf.training import VoCoSFTTrainer
from voco_llama_hf.training import llava_data as module
from voco_llama_hf.training.llava_data import load_llava_data


disable_progress_bars()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


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
    "a turn is from 'dog', expected human or gpt": {"conversations": [{"from": "dog", "value": "Wau"}]},
    "a turn is from ['gpt'], expected human or gpt": {"conversations": [{"from": ["gpt"], "value": "Wau"}]},
    "do not take turns: user, user": {"conversations": turns("a") + turns("b")},
    "it says <image> 2 times, but has 1 images": {"image": "a.png", "conversations": turns("<image><image>", "A.")},
    "it says <image> 0 times, but has 1 images": {"image": "a.png", "conversations": turns("What?", "A.")},
    "it says <video> 0 times, but has 1 videos": {**FILM, "conversations": turns("What?", "A.")},
    "its image is no path and no list of paths: 5": {"image": 5, "conversations": turns("<image>", "A.")},
    "its video is no path and no list of paths: [None]": {**FILM, "video": [None]},
    "no such video": {**FILM, "video": "none.mp4"},
    "it has no conversations": {"image": "a.png"},
    "a turn is no {'from': ..., 'value': ...}: 5": {"conversations": [5]},
}
DAMAGED = {
    "is not an image": {"image": "text.png", "conversations": turns("<image>", "A.")},
    "is damaged": {"image": "cut.png", "conversations": turns("<image>", "A.")},
    "text.png cannot be decoded": {**FILM, "video": "text.png"},
}


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def reports(caplog):
    return [record.message for record in caplog.records if "is left out" in record.message]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_become_messages_and_images(tmp_path, images, suffix):
    rows = load_llava_data(write(tmp_path / f"data{suffix}", GOOD), images)
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


def test_a_turn_without_words_is_one_of_an_empty_text(tmp_path, images):
    (row,) = load_llava_data(write(tmp_path / "data.json", [{"conversations": turns("Hello", "")}]), images)
    assert row["messages"][1]["content"] == [{"type": "text", "text": ""}]


def test_videos_become_frames(tmp_path, images):
    (row,) = load_llava_data(write(tmp_path / "data.json", [FILM]), images, num_frames=4)
    video, text = row["messages"][0]["content"]
    assert text == {"type": "text", "text": "Does it brighten?"} and row["images"] == []
    assert [frame.shape for frame in video["video"]] == [(48, 64, 3)] * 4
    assert all(np.diff([frame[:, :32].mean() for frame in video["video"]]) > 10)


def test_bad_rows_are_reported_by_number_and_left_out(tmp_path, images, caplog):
    rows = [GOOD[0], *BAD.values(), GOOD[1]]
    with caplog.at_level(logging.WARNING):
        read = load_llava_data(write(tmp_path / "data.json", rows), images, max_bad_rows=len(BAD))
    assert [len(row["images"]) for row in read] == [1, 1] and len(reports(caplog)) == len(BAD)
    for number, message in enumerate(BAD, start=2):
        (line,) = [line for line in reports(caplog) if f"row {number} is left out" in line]
        assert message in line, line
        assert f"({number - 1} so far)" in line
    # The table is there, and they are told again
    caplog.clear()
    load_llava_data(tmp_path / "data.json", images)
    assert len(reports(caplog)) == len(BAD)
    with pytest.raises(ValueError, match=r"more than 3 rows of data\.json cannot be read, the last is row 5"):
        load_llava_data(tmp_path / "data.json", images, max_bad_rows=3)


def test_too_many_bad_rows_are_an_error_at_once(tmp_path, images):
    path = write(tmp_path / "data.json", [*GOOD, *BAD.values()])
    with pytest.raises(ValueError, match=r"more than 3 rows of data\.json cannot be read, the last is row 8"):
        load_llava_data(path, images, max_bad_rows=3)
    with pytest.raises(ValueError, match=r"no row of data\.json can be read"):
        load_llava_data(write(tmp_path / "data.json", list(BAD.values())), images)


def test_a_damaged_file_gives_its_place_to_another_row(tmp_path, images, caplog):
    for epochs, (message, row) in enumerate(DAMAGED.items(), start=1):
        caplog.clear()
        data = load_llava_data(write(tmp_path / f"{epochs}.json", [*GOOD, row]), images)
        with caplog.at_level(logging.WARNING):
            first, second = data[:], data[:]
        assert first["messages"] == second["messages"] and len(first["messages"]) == 5
        assert first["messages"][4] in first["messages"][:4]
        (line,) = reports(caplog)
        assert message in line and "row 5 is left out" in line
    rows = [*GOOD, *DAMAGED.values()]
    data = load_llava_data(write(tmp_path / "data.json", rows), images, max_bad_rows=2)
    with pytest.raises(ValueError, match=r"more than 2 rows of data\.json cannot be read, the last is row 7"):
        data[:]
    with pytest.raises(ValueError, match=r"no row of data\.json can be read"):
        load_llava_data(write(tmp_path / "data.json", list(DAMAGED.values())), images)[:]


def test_half_a_character_is_no_text(tmp_path, images, caplog):
    load_llava_data(write(tmp_path / "data.jsonl", [*GOOD, {"conversations": turns("\ud800", "A.")}]), images)
    assert "row 5 is left out: a text is no Unicode" in reports(caplog)[0]


def test_files_that_were_missing_are_looked_for_again(tmp_path, images, caplog):
    path = write(tmp_path / "data.json", [*GOOD, BAD["no such image"]])
    assert len(load_llava_data(path, images)) == 4
    (images / "a.png").rename(images / "none.png")
    caplog.clear()
    data = load_llava_data(path, images)
    assert len(data) == 5 and reports(caplog) == []
    assert data[4]["images"][0].size == (40, 30)


def count_tables(monkeypatch):
    """Grows by one whenever a table is made."""
    made = []
    generate = module.generate_rows
    monkeypatch.setattr(module, "generate_rows", lambda **options: (made.append(1), (yield from generate(**options))))
    return made


def test_a_table_is_made_once_until_the_file_changes(tmp_path, images, monkeypatch):
    made = count_tables(monkeypatch)
    path = write(tmp_path / "data.json", GOOD)
    first = load_llava_data(path, images)
    again = load_llava_data(path, images)
    assert len(made) == 1 and first[:]["messages"] == again[:]["messages"]
    assert first.cache_files == again.cache_files != []
    write(path, GOOD[:2])
    assert len(load_llava_data(path, images)) == 2 and len(made) == 2
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="more than 0 rows"):
        load_llava_data(path, other, max_bad_rows=0)
    assert len(load_llava_data(path, images)) == 2 and len(made) == 3


def test_lengths_count_words_and_vision_tokens(tmp_path, images):
    data = load_llava_data(write(tmp_path / "data.json", [*GOOD, FILM]), images, num_frames=4)
    table = data.with_format(None)
    assert table["length"][:] == [576 + 8, 576 + 6, 3, 2 * 576 + 3, 4 * 576 + 5]
    names = table.features["modality"].names
    assert [names[kind] for kind in table["modality"]] == ["image", "image", "text", "image", "video"]


@pytest.mark.parametrize("test_size, expected", [(0.25, 10), (3, 3)])
def test_a_part_is_held_out(tmp_path, images, test_size, expected):
    rows = [{"image": "a.png", "conversations": turns("<image>", str(i))} for i in range(40)]
    path = write(tmp_path / "data.json", rows)
    parts = load_llava_data(path, images, test_size=test_size, seed=1)
    texts = {
        name: {row["messages"][1]["content"][0]["text"] for row in part if len(row["images"]) == 1}
        for name, part in parts.items()
    }
    assert len(texts["test"]) == expected and not texts["train"] & texts["test"]
    assert texts["train"] | texts["test"] == {str(i) for i in range(40)}
    again = load_llava_data(path, images, test_size=test_size, seed=1)
    assert again["test"][:]["messages"] == parts["test"][:]["messages"]


def test_no_damaged_row_of_one_part_is_replaced_from_the_other(tmp_path, images):
    rows = [{"image": "a.png", "conversations": turns("<image>", str(i))} for i in range(40)]
    rows += [{"image": "cut.png", "conversations": turns("<image>", "cut")}] * 20
    parts = load_llava_data(write(tmp_path / "data.json", rows), images, test_size=0.5)
    texts = [{row["messages"][1]["content"][0]["text"] for row in part} for part in parts.values()]
    assert len(texts[0] | texts[1]) == 40 and not texts[0] & texts[1]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
texts = st.text() | st.sampled_from(["<image>", "<video> a", "\ud800", "a.png", "../a.png", "a\0b"])
any_turn = json_values | st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "dog"]) | json_values, "value": texts | json_values}
)
any_row = json_values | st.fixed_dictionaries(
    {"conversations": st.lists(any_turn, max_size=4) | json_values},
    optional={
        name: texts | st.lists(texts, max_size=2) | json_values for name in ("image", "images", "video", "videos")
    },
)


@given(rows=st.lists(any_row, max_size=4), lines=st.booleans())
@example(rows=[-(2**63), {**GOOD[0], "id": 10**30, "score": 0.5}], lines=False)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds_good_rows_are_read(tmp_path, images, rows, lines):
    path = write(tmp_path / f"any.{'jsonl' if lines else 'json'}", [GOOD[0], *rows])
    data = load_llava_data(path, images)
    assert data[0]["messages"][0]["role"] == "user" and 1 <= len(data) <= 1 + len(rows)


def test_a_table_that_was_not_finished_is_made_anew(tmp_path, images):
    path = write(tmp_path / "data.jsonl", GOOD * 100)
    script = (
        "import os, signal, sys; from voco_llama_hf.training import llava_data as m; generate = m.generate_rows\n"
        "def killed(**options):\n"
        "    for i, row in enumerate(generate(**options)):\n"
        "        if i == 250: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield row\n"
        "m.generate_rows = killed; m.load_llava_data(sys.argv[1], sys.argv[2], cache_dir=sys.argv[3])"
    )
    args = [sys.executable, "-c", script, str(path), str(images), str(tmp_path / "killed")]
    assert subprocess.run(args, capture_output=True, env={**os.environ}).returncode == -signal.SIGKILL
    assert len(load_llava_data(path, images, cache_dir=tmp_path / "killed")) == 400


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
        load_llava_data(path, images)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*data\.json"):
        load_llava_data(tmp_path / "data.json")
    write(tmp_path / "data.json", GOOD)
    with pytest.raises(FileNotFoundError, match=r"no such image folder: .*nowhere"):
        load_llava_data(tmp_path / "data.json", tmp_path / "nowhere")


def numbered(folder, number):
    """Rows that are told by the size of their image."""
    for i in range(number):
        Image.new("RGB", (20 + i, 20)).save(folder / f"{i}.png")
    return [{"image": f"{i}.png", "conversations": turns("<image>", "A.")} for i in range(number)]


def train(tmp_path, data, seen, **options):
    """Trains, and writes down the rows that the collator of every step gets."""
    processor, model = processor_and_model()
    trainer = VoCoSFTTrainer(
        model, config(tmp_path / "out", **options), train_dataset=data, processing_class=processor
    )
    collate = trainer.data_collator.torch_call

    def note(examples):
        seen.append([example["images"][0].size[0] - 20 for example in examples])
        return collate(examples)

    trainer.data_collator.torch_call = note
    return trainer


def test_epochs_draw_every_row_in_another_order_and_a_resume_reads_no_row_twice(tmp_path, images):
    data = load_llava_data(write(tmp_path / "data.json", numbered(images, 12)), images)
    whole, rest = [], []
    options = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 3}
    train(tmp_path, data, whole, save_strategy="steps", save_steps=5, **options).train()
    orders = [list(chain(*batches)) for batches in (whole[:4], whole[4:])]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1] and list(range(12)) not in orders
    train(tmp_path, data, rest, **options).train(str(tmp_path / "out" / "checkpoint-5"))
    assert rest == whole[5:]


def test_many_workers_read_every_row_once(tmp_path, images):
    data = load_llava_data(write(tmp_path / "data.json", numbered(images, 12)), images)
    trainer = train(tmp_path, data, [], dataloader_num_workers=3, per_device_train_batch_size=2)
    loader = trainer.get_train_dataloader()
    assert loader.num_workers == 3
    trainer.data_collator.torch_call = lambda examples: [row["images"][0].size[0] - 20 for row in examples]
    assert sorted(chain(*loader)) == list(range(12))


def test_images_and_videos_train(tmp_path, images):
    path = write(tmp_path / "data.json", [*GOOD, FILM, BAD["no such image"], DAMAGED["is damaged"]])
    processor, model = processor_and_model()
    trainer = VoCoSFTTrainer(
        model,
        config(tmp_path / "out", max_steps=4, num_voco_tokens=[2, 1, 0], group_by_modality_length=True),
        train_dataset=load_llava_data(path, images),
        processing_class=processor,
    )
    trainer.train()
    assert len(losses(trainer)) == 4


@pytest.mark.slow
def test_a_file_of_a_million_rows_takes_little_more_memory_than_a_small_one(tmp_path):
    grown = {}
    for number in (10_000, 1_000_000):
        args = [sys.executable, str(Path(__file__).with_name("large_file.py")), str(tmp_path), str(number)]
        done = subprocess.run(args, capture_output=True, text=True, check=True)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
        figures = json.loads(line)
        grown[number] = figures["end_own_mb"] - figures["start_own_mb"]
    assert grown[1_000_000] - grown[10_000] < 100, grown
