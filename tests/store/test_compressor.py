"""VoCoCompressor in pipelines: one row a row, the numbers of the model, and nothing opened that a row names."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from cli.conftest import save_checkpoint
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from video_files import make_frames, write_video

from voco_llama_hf import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.images import open_image
from voco_llama_hf.store import VoCoCompressor, arrow_schema, cache_from_row, hash_file, hash_pixels
from voco_llama_hf.videos import read_frames


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=0))


@pytest.fixture(scope="module")
def compressor(checkpoint) -> VoCoCompressor:
    return VoCoCompressor(checkpoint, num_voco_tokens=2, num_frames=3, batch_size=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list:
    folder, noise = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(noise.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    write_video(folder / "film.mp4", make_frames(10))
    return [folder / "0.png", folder / "1.png", folder / "film.mp4", folder / "2.png"]


def check(row: dict, frames: list, checkpoint: str) -> None:
    model = VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint)
    processor = VoCoLlamaProcessor.from_pretrained(checkpoint)
    fresh = model.compress(processor.image_processor(frames, return_tensors="pt")["pixel_values"], 2)
    found = cache_from_row(row)
    assert found.token_counts == fresh.token_counts and found.fingerprint == fresh.fingerprint
    torch.testing.assert_close(found.keys, fresh.keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.values, fresh.values, atol=1e-5, rtol=1e-4)


def test_bytes(compressor, checkpoint, files):
    paths = [*map(str, files), "broken.png", "broken.mp4", ""]
    batch = {"image": [*(path.read_bytes() for path in files), b"half", b"", None], "path": paths, "label": range(7)}
    table = compressor(batch)
    assert table.schema.names[: len(arrow_schema())] == arrow_schema().names
    rows = table.to_pylist()
    assert [row["sources"] for row in rows] == [[path] if path else [] for path in paths]
    assert [row["label"] for row in rows] == list(range(7))
    assert [row["error"] is None for row in rows] == [True] * 4 + [False] * 3
    assert [row["content_hash"] for row in rows] == [*map(hash_file, files), None, None, None]
    for row, path in zip(rows, files):
        check(row, list(read_frames(path, 3)) if path.suffix == ".mp4" else [open_image(path)], checkpoint)
    assert compressor(table.select(["label"]).append_column("image", pa.array(batch["image"]))).num_rows == 7


def test_datasets(compressor, checkpoint, files):
    pictures = [str(path) for path in files if path.suffix == ".png"]
    data = Dataset.from_dict({"image": pictures, "label": [5, 6, 7]}).cast_column("image", ImageFeature())
    rows = data.map(compressor, batched=True, batch_size=2)
    assert rows["label"][:] == [5, 6, 7]
    for row, path in zip(rows, pictures):
        check(row, [open_image(path)], checkpoint)
        assert row["content_hash"] == hash_pixels(Image.open(path))


def test_arrays(compressor, checkpoint, files):
    """As Ray reads images: an array, or one array an image."""
    pixels = np.stack([np.asarray(Image.open(files[i])) for i in (0, 1)])
    for images in (pixels, list(pixels)):
        rows = compressor({"image": images}).to_pylist()
        check(rows[1], [Image.fromarray(pixels[1])], checkpoint)
    (row,) = compressor({"image": [pixels[0].astype(float)]}).to_pylist()
    assert "is no image: give the bytes of a file" in row["error"]


def test_transparency_and_rotation_are_those_of_files(compressor, tmp_path):
    image = Image.new("RGBA", (30, 40), (200, 0, 0, 90))
    image.save(tmp_path / "a.png")
    # One at a time: by its place in a batch a product may round otherwise
    rows = [compressor({"image": [one]}).to_pylist()[0] for one in (image, (tmp_path / "a.png").read_bytes())]
    assert rows[0]["keys"] == rows[1]["keys"]


@pytest.mark.parametrize("value", [{"bytes": None, "path": "{path}"}, "{path}", {"path": "{path}"}])
def test_paths_in_rows_of_others_are_not_opened(compressor, files, value):
    path = str(files[0])
    value = {name: text and path for name, text in value.items()} if isinstance(value, dict) else path
    (row,) = compressor({"image": [value]}).to_pylist()
    assert row["error"] is not None and row["keys"] is None


def test_undecoded_columns_of_data_sets(compressor, files):
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in files]
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}})
    found = Dataset.from_list(rows, features=features).map(compressor, batched=True)
    assert [row["sources"] for row in found] == [[path.name] for path in files]
    assert [row["num_images"] for row in found] == [1, 1, 3, 1]


def test_8_bits_and_bfloat16(checkpoint, files):
    content = files[0].read_bytes()
    (full,) = VoCoCompressor(checkpoint, 2, dtype="bfloat16")({"image": [content]}).to_pylist()
    (half,) = VoCoCompressor(checkpoint, 2, dtype="bfloat16", eight_bit=True)({"image": [content]}).to_pylist()
    assert full["dtype"] == half["dtype"] == "bfloat16" and len(full["keys"]) == 2 * len(half["keys"])
    assert cache_from_row(full).dtype == cache_from_row(half).dtype == torch.bfloat16
    torch.testing.assert_close(cache_from_row(full).keys, cache_from_row(half).keys, atol=0.03, rtol=0.03)


def test_it_travels_as_its_arguments(compressor, files):
    packed = pickle.dumps(compressor)
    assert len(packed) < 2_000
    content = files[0].read_bytes()
    assert pickle.loads(packed)({"image": [content]}).equals(compressor({"image": [content]}))


def test_what_does_not_fit_is_an_error(compressor, checkpoint):
    with pytest.raises(KeyError, match="no column 'image': there are picture"):
        compressor({"picture": [b""]})
    with pytest.raises(ValueError, match="num_frames or fps, not both"):
        VoCoCompressor(checkpoint, num_frames=2, fps=1.0)
    with pytest.raises(ValueError, match="at most 576"):
        VoCoCompressor(checkpoint, 999)
    assert compressor({"image": []}).num_rows == 0
