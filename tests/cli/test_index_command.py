import json
import re
import sys

import numpy as np
import pytest
from PIL import Image
from video_files import make_frames, write_video

from voco_llama_hf.store import VoCoStore


@pytest.fixture
def index(invoke, checkpoint):
    return lambda *args, **kwargs: invoke("index", "--model", checkpoint, *args, **kwargs)


@pytest.fixture
def ask(invoke, checkpoint):
    return lambda *args, **kwargs: invoke("ask", "--model", checkpoint, "--max-new-tokens", 6, *args, **kwargs)


@pytest.fixture
def film(images):
    return write_video(images[0].parent / "film.mp4", make_frames(10))


@pytest.fixture
def store(index, images, film, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "store"
    index(images[0].parent, "--store", path, "-k", 2, "--num-frames", 4)
    return path


def test_index(index, images, film, tmp_path):
    (tmp_path / "broken.png").write_bytes(images[0].read_bytes()[:60])
    store = tmp_path / "store"
    result = index(tmp_path, "--store", store, "-k", 2, "--num-frames", 4, "--8bit")
    assert f"{store}: 4 entries, 7 images or frames" in result.stdout
    assert "5 files found, 1 cannot be read" in result.stdout
    # 7 times 4 vision tokens of 768 bytes in float32
    assert re.search(r"key-value cache: 21\.5 kB -> \d", result.stdout)
    assert re.fullmatch(r"left out .*broken\.png: .*broken\.png (is damaged|cannot be read).*\n", result.stderr)
    with VoCoStore(store) as opened:
        assert opened.eight_bit and len(opened) == 4
    again = index(tmp_path, "--store", store, "-k", 2, "--num-frames", 4)
    assert "4 entries, 7 images or frames" in again.stdout


def test_ask_a_store(ask, images, film, store):
    name = images[1].name
    assert ask("--store", store, "--image", name, "What?").stdout == ask(images[1], "What?", "-k", 2).stdout
    several = ask("--store", store, "--image", images[2], "--image", film.name, "-i", name, "What?")
    assert several.stdout == ask(images[2], film, images[1], "What?", "-k", 2, "--num-frames", 4).stdout
    assert "done before, in" in ask("--store", store, "-i", name, "What?", "--stats").stderr


def test_ask_a_video(ask, film, checkpoint):
    """Reference: the processor on the file."""
    from voco_llama_hf import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor

    model = VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint)
    processor = VoCoLlamaProcessor.from_pretrained(checkpoint)
    inputs = processor(videos=film, text="user: <video>What moves?assistant: ", fps=5, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert (
        ask(film, "What moves?", "--fps", 5).stdout.strip() == processor.decode(ids, skip_special_tokens=True).strip()
    )


def test_info(invoke, images, store):
    result = invoke("store", "info", store, "--files")
    for line in ("4 entries, ", "images: 3", "videos: 1, 4 frames", "VoCo tokens: k=2 4", "text_model llama"):
        assert line in result.stdout
    assert len(re.findall(r"^[0-9a-f]{12} k=2 .*image\d\.png$", result.stdout, re.MULTILINE)) == 3
    assert re.search(r"^[0-9a-f]{12} k=2 num_frames=4 .*film\.mp4$", result.stdout, re.MULTILINE)


def test_help_lists_the_commands(invoke):
    for command in ("info", "verify", "remove", "compact", "export", "import"):
        assert f" {command} " in invoke("store").stdout


def test_remove(invoke, ask, images, store):
    result = invoke("store", "remove", store, images[0].name, "film.mp4")
    assert "2 entries removed, " in result.stdout
    assert "2 entries" in invoke("store", "info", store).stdout
    assert "has no 'image0.png'" in ask("--store", store, "-i", images[0].name, "What?", exit_code=2).stderr
    assert "has no 'image0.png'" in invoke("store", "remove", store, images[0].name, exit_code=2).stderr
    assert "freed" in invoke("store", "compact", store).stdout


def test_verify(invoke, index, images, store):
    assert "4 entries, 0 damaged" in invoke("store", "verify", store).stdout
    (shard,) = (store / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    from typer.testing import CliRunner

    from voco_llama_cli import app

    result = CliRunner().invoke(app, ["store", "verify", str(store)])
    assert result.exit_code == 1 and "4 entries, 1 damaged" in result.stdout
    assert result.stderr.count("\n") == 1 and "does not match its checksum" in result.stderr
    assert "1 damaged and removed" in invoke("store", "verify", store, "--remove-damaged").stdout
    index(images[0].parent, "--store", store, "-k", 2, "--num-frames", 4)
    assert "4 entries, 0 damaged" in invoke("store", "verify", store).stdout


def test_export_and_import(invoke, ask, images, store, tmp_path):
    pytest.importorskip("pyarrow")
    out, copy = tmp_path / "out", tmp_path / "copy"
    assert f"{out}: 4 entries, " in invoke("store", "export", store, out).stdout
    assert f"{copy}: 4 entries, " in invoke("store", "import", out, "--store", copy).stdout
    name = images[1].name
    assert ask("--store", copy, "-i", name, "What?").stdout == ask("--store", store, "-i", name, "What?").stdout
    assert "already exists and is not empty" in invoke("store", "export", store, out, exit_code=1).stderr
    result = invoke("store", "import", tmp_path / "none", "--store", tmp_path / "new", exit_code=1)
    assert "No such file" in result.stderr and not (tmp_path / "new").exists()


def test_a_store_behind_a_url(invoke, ask, images, store):
    url = f"file://{store}"
    assert invoke("store", "info", url).stdout == invoke("store", "info", store).stdout.replace(str(store), url)
    assert f"{url}: 4 entries, 0 damaged" in invoke("store", "verify", url).stdout
    name = images[1].name
    assert ask("--store", url, "-i", name, "What?").stdout == ask("--store", store, "-i", name, "What?").stdout
    assert "can be read, but not written" in invoke("store", "remove", url, name, exit_code=1).stderr
    assert "can be read, but not written" in invoke("store", "compact", url, exit_code=1).stderr


def test_a_cluster_without_its_extra(index, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = index(tmp_path, "--store", tmp_path / "s", "--cluster", exit_code=2)
    assert "pip install 'voco-llama-hf[ray]'" in result.stderr and not (tmp_path / "s").exists()
    result = index("s3://bucket/photos", "--store", tmp_path / "s", exit_code=2)
    assert "s3://bucket/photos is not a folder: --cluster reads it" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{folder}/missing", "--store", "{folder}/s"], "missing is not a folder"),
        (["{folder}"], "Missing option '--store'"),
        (["{folder}", "--store", "{folder}/image0.png"], "is a file: --store takes a folder"),
        (["{folder}", "--store", "{folder}/s", "--fps", "1", "--num-frames", "2"], "--num-frames or --fps, not both"),
        (["{folder}", "--store", "{folder}/s", "--fps", "0"], "--fps must be above 0"),
        (["{folder}", "--store", "{folder}/s", "-k", "0"], "Invalid value for .--num-voco-tokens"),
    ],
)
def test_usage_errors(index, images, tmp_path, args, message):
    assert re.search(message, index(*[arg.format(folder=tmp_path) for arg in args], exit_code=2).stderr)
    assert not (tmp_path / "s").exists()


def test_too_many_voco_tokens(index, images, tmp_path):
    assert "at most 576, got 999" in index(tmp_path, "--store", tmp_path / "s", "-k", 999, exit_code=1).stderr
    assert not (tmp_path / "s").exists()


def test_without_the_video_extra(index, ask, images, film, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for result in (index(tmp_path, "--store", tmp_path / "s", exit_code=2), ask(film, "What?", exit_code=2)):
        assert "pip install 'voco-llama-hf[video]'" in result.stderr
    assert not (tmp_path / "s").exists()
    ask(images[0], "What?")


def test_ask_errors(ask, invoke, images, store, tmp_path, other_checkpoint):
    for args, message in (
        (["--store", store, "What?"], "--store and --image go together"),
        (["--image", "a.png", "What?"], "--store and --image go together"),
        ([images[0], "--store", store, "-i", "image0.png", "What?"], "give --store with --image, or images"),
        (["--store", store, "-i", "image0.png", "What?", "-k", 3], "has no 'image0.png' with 3 VoCo tokens"),
    ):
        assert message in ask(*args, exit_code=2).stderr
    assert "no VoCoStore at" in ask("--store", tmp_path / "none", "-i", "a", "What?", exit_code=1).stderr
    other = invoke("ask", "--model", other_checkpoint, "--store", store, "-i", "image0.png", "What?", exit_code=1)
    assert "made by another model" in other.stderr and "weights is" in other.stderr


def test_names_that_fit_several(ask, index, images, tmp_path):
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "deep" / "image0.png")
    index(tmp_path, "--store", tmp_path / "store")
    result = ask("--store", tmp_path / "store", "-i", "image0.png", "What?", exit_code=2)
    assert "can be any of" in result.stderr and "give more of its path" in result.stderr
    ask("--store", tmp_path / "store", "-i", "deep/image0.png", "What?")
    index(tmp_path, "--store", tmp_path / "store", "-k", 3)
    result = ask("--store", tmp_path / "store", "-i", "image1.png", "What?", exit_code=2)
    assert "stored more than once (k=1, k=3): choose with --num-voco-tokens" in result.stderr
    assert ask("--store", tmp_path / "store", "-i", "image1.png", "What?", "-k", 3).stdout


def test_embedded_model_reads_the_example_from_a_store(invoke, tmp_path):
    from cli.test_ask import EXAMPLES

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "scene.png").write_bytes((EXAMPLES / "scene.png").read_bytes())
    rows = json.loads((EXAMPLES / "scene.json").read_text())["questions"][:4]
    for options in ([], ["--8bit"]):
        store = tmp_path / f"store{len(options)}"
        invoke("index", tmp_path / "photos", "--store", store, "-k", 2, *options)
        answers = [invoke("ask", "--store", store, "-i", "scene.png", row["question"]).stdout.strip() for row in rows]
        direct = [invoke("ask", EXAMPLES / "scene.png", row["question"], "-k", 2).stdout.strip() for row in rows]
        assert answers == direct
