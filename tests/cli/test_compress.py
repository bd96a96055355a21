import re

import pytest
import torch
from PIL import Image

from voco_llama_hf import VoCoCache


@pytest.fixture
def compress(invoke, checkpoint):
    return lambda *args, **kwargs: invoke("compress", "--model", checkpoint, *args, **kwargs)


def test_compress(compress, images, tmp_path):
    result = compress(*images, "-k", 2, "--output", tmp_path / "cache.safetensors")
    assert re.search(r"cache\.safetensors: 3 images, 2 VoCo tokens each\n", result.stdout)
    assert "key-value cache: 9.2 kB -> 4.6 kB, 2x smaller" in result.stdout
    cache = VoCoCache.load(tmp_path / "cache.safetensors")
    assert "image_mean" in cache.fingerprint["image_processor"]
    assert cache.token_counts == [2, 2, 2]
    assert cache.nbytes == 6 * 768


def test_order_and_batches(compress, images, tmp_path):
    """Batches do not change what is stored, and it is stored in the order given."""
    compress(*images, "--output", tmp_path / "all")
    compress(*images[::-1], "--output", tmp_path / "reversed", "--batch-size", 2)
    first, second = VoCoCache.load(tmp_path / "all"), VoCoCache.load(tmp_path / "reversed")
    torch.testing.assert_close(first.values, second.values.flip(0))
    assert (first.values[0] - first.values[1]).abs().max() > 1e-3


def test_many_images_print_nothing_else(compress, images, tmp_path):
    result = compress(*images * 5, "--output", tmp_path / "cache", "--batch-size", 4)
    assert "15 images, 1 VoCo token each" in result.stdout
    assert result.stderr == ""


def test_existing_output(compress, images, tmp_path):
    output = tmp_path / "cache"
    output.write_text("old")
    result = compress(images[0], "--output", output, exit_code=2)
    assert "exists: give another name, or --force" in result.stderr
    assert output.read_text() == "old"
    compress(images[0], "--output", output, "--force")
    assert len(VoCoCache.load(output)) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--output", "{folder}/cache"], "Missing argument"),
        (["{image}"], "Missing option '--output'"),
        (["{image}", "--output", "{folder}/missing/cache"], "missing is not a folder: cache cannot be written there"),
        (["{image}", "--output", "{image}/cache"], r"image0\.png is not a folder"),
        (["{image}", "--output", "{folder}"], "is a folder: name the file to write"),
        (["{image}", "--output", ""], "is a folder: name the file to write"),
        (["{image}", "--output", "{image}", "--force"], "is one of the inputs"),
        (["{image}", "--output", "{folder}/cache", "-k", "0"], "Invalid value for .--num-voco-tokens"),
        (["{image}", "--output", "{folder}/cache", "--batch-size", "0"], "Invalid value for .--batch-size"),
        (["{image}", "--output", "{folder}/cache", "--device", "abacus"], "no device 'abacus' here"),
    ],
)
def test_usage_errors(compress, images, tmp_path, args, message):
    args = [arg.format(image=images[0], folder=tmp_path) for arg in args]
    assert re.search(message, compress(*args, exit_code=2).stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image0.png", "image1.png", "image2.png"]


def test_nothing_is_written_for_a_bad_image(compress, images, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    Image.effect_noise((64, 64), 100).save(tmp_path / "damaged.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "damaged.png").read_bytes()[:500])
    for bad in ("text.png", "damaged.png", "missing.png"):
        compress(*images * 4, tmp_path / bad, "--output", tmp_path / "cache", exit_code=1)
        assert not (tmp_path / "cache").exists()


def test_too_many_voco_tokens(compress, images, tmp_path):
    result = compress(images[0], "-k", 10_000, "--output", tmp_path / "cache", exit_code=1)
    assert "at most 576, got 10000" in result.stderr
