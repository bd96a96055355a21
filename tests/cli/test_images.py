import numpy as np
import pytest
from PIL import Image

from voco_llama_hf.images import check_image, open_image


RED = (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "a.png"), ("RGB", "a.webp"), ("RGBA", "a.png"), ("P", "a.png"), ("P", "a.gif"), ("CMYK", "a.jpg")],
)
def test_colour_modes(tmp_path, mode, name):
    Image.new("RGB", (20, 10), RED).convert(mode).save(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.abs(np.array(image.getpixel((5, 5))) - RED).max() <= 2


@pytest.mark.parametrize(("mode", "grey"), [("1", 255), ("L", 200), ("LA", 200)])
def test_grey_modes(tmp_path, mode, grey):
    Image.new("L", (20, 10), grey).convert(mode).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((5, 5)) == (grey,) * 3


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_greys_are_scaled(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.array([[0, 128 * 256], [64 * 256, 65535]], dtype=np.uint16)).save(path)
    assert np.asarray(open_image(path))[..., 0].tolist() == [[0, 128], [64, 255]]


def test_transparency_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("P", (4, 4)).save(tmp_path / "b.png", transparency=0)
    assert {open_image(tmp_path / name).getpixel((0, 0)) for name in ("a.png", "b.png")} == {(255, 255, 255)}


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (20, 40)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 100)])
def test_odd_sizes(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == size


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((20_000, 6_000), "too large: 20000x6000, at most 100,000,000 pixels"),
        ((20_000, 10_000), "too large: at most 100,000,000 pixels"),  # Pillow itself refuses to open it
        ((20_000, 10), "too narrow: 20000x10, one side can be at most 1,000 times the other"),
    ],
)
def test_bounds(tmp_path, size, message):
    Image.new("1", size).save(tmp_path / "a.png")
    for read in (check_image, open_image):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.png")


def test_truncated_images(tmp_path):
    noise = Image.effect_noise((64, 64), 100)
    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.tiff"):
        path = tmp_path / name
        noise.save(path)
        content = path.read_bytes()
        for size in (0, 10, 40, len(content) // 2):
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match=f"{name} (is damaged|is not an image|cannot be read)"):
                open_image(path)


def test_no_image(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png is not an image"):
        check_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match="is a folder"):
        check_image(tmp_path)
    for missing in (tmp_path / "missing.png", "x" * 5000, ""):
        with pytest.raises(FileNotFoundError, match="no such image"):
            check_image(missing)
