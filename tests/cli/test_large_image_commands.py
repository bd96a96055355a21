"""Models that divide images into tiles, in all that stands on images: commands, store, server, demo, evaluation."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import openai
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from cli.conftest import save_checkpoint
from modeling.helpers import TILED, build_processor, random_images, tiny_model
from modeling.test_large_processing import picture
from serving.conftest import MODEL, ask, client_of, data_url, in_process

from voco_llama_hf import VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.demo import DemoEngine
from voco_llama_hf.hub.card import make_card
from voco_llama_hf.images import open_image
from voco_llama_hf.modeling.fingerprint_voco_llama import with_images
from voco_llama_hf.scenes.evaluation import evaluate_scenes
from voco_llama_hf.serving import Limits
from voco_llama_hf.store import Content, VoCoCompressor, VoCoStore, cache_from_row, hash_file
from voco_llama_hf.store.content import TILES
from voco_llama_hf.store.indexing import Indexer, Sampling
from voco_llama_hf.store.parquet import import_parquet
from voco_llama_hf.vision_tokens import count_image_tiles, count_vision_tokens


SIZES = [(90, 40), (30, 30), (20, 200), (84, 84)]
QUESTION = "What is it?"


@pytest.fixture(scope="module", params=TILED)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    processor = build_processor(request.param)
    tiny_model(voco_token_id=processor.image_token_id, **TILED[request.param]).save_pretrained(path)
    processor.save_pretrained(path)
    for number, size in enumerate(SIZES):
        (path / "photos").mkdir(exist_ok=True)
        picture(*size, seed=number).save(path / "photos" / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def model(folder):
    return VoCoLlamaForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return VoCoLlamaProcessor.from_pretrained(folder)


def answer(model, processor, path: Path, k: int, max_new_tokens: int = 6) -> str:
    text = f"user: <image>{QUESTION}assistant: "
    inputs = processor(images=open_image(path), text=text, num_voco_tokens=k, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def answer_per_tile(model, processor, photos: list[Path], k: int) -> str:
    inputs = processor(
        images=[open_image(photo) for photo in photos],
        text=f"user: {'<image>' * len(photos)}{QUESTION}assistant: ",
        num_voco_tokens_per_tile=k,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_ask_and_compress(invoke, folder, model, processor, tmp_path):
    photos = sorted((folder / "photos").iterdir())
    question = ["--model", folder, "--max-new-tokens", 6, "-k", 2]
    for photo in photos[:2]:
        assert invoke("ask", *question, photo, QUESTION).stdout.strip() == answer(model, processor, photo, 2)
    cache = tmp_path / "photos.safetensors"
    printed = invoke("compress", "--model", folder, "-k", 2, "--output", cache, *photos).stdout
    vision_tokens = sum(count_vision_tokens(model.config, (height, width)) for width, height in SIZES)
    assert f"{vision_tokens / (2 * len(SIZES)):.0f}x smaller" in printed
    single = tmp_path / "one.safetensors"
    invoke("compress", "--model", folder, "-k", 2, "--output", single, photos[0])
    asked = invoke("ask", "--model", folder, "--max-new-tokens", 6, "--cache", single, QUESTION)
    assert asked.stdout.strip() == answer(model, processor, photos[0], 2)
    assert "agrees" in invoke("check", "--model", folder).stdout


def test_voco_tokens_of_every_tile(invoke, folder, model, processor, tmp_path):
    """Asked at once or from a file, as the processor and `generate` do."""
    photos, cache = sorted((folder / "photos").iterdir())[:2], tmp_path / "photos.safetensors"
    expected = answer_per_tile(model, processor, photos, 2)

    ask, per_tile = ["ask", "--model", folder, "--max-new-tokens", 6], ["--num-voco-tokens-per-tile", 2]
    asked = invoke(*ask, *per_tile, "--stats", *photos, QUESTION)
    assert asked.stdout.strip() == expected and re.search(r"images +2 *\n", asked.stderr)

    printed = invoke("compress", "--model", folder, *per_tile, "--output", cache, *photos).stdout
    tiles = re.search(r"2 images in ([\d,]+) tiles, 2 VoCo tokens each", printed).group(1)
    pictures = [open_image(photo) for photo in photos]
    num_tiles = len(processor(images=pictures, num_voco_tokens_per_tile=2, return_tensors="pt")["pixel_values"])
    assert len(VoCoCache.load(cache)) == sum(map(int, tiles.split(","))) == num_tiles
    assert invoke(*ask, "--cache", cache, "--num-tiles", tiles, QUESTION).stdout.strip() == expected

    for args, message in (
        ([*per_tile, "-k", 2, *photos], "--num-voco-tokens or --num-voco-tokens-per-tile, not both"),
        (["--num-tiles", "2", *photos], "--num-tiles goes with --cache"),
        (["--cache", cache, "--num-tiles", "1,1"], "which are not the .* of --num-tiles"),
        (["--cache", cache, "--num-tiles", ""], "which are not the .* of --num-tiles"),
    ):
        assert re.search(message, " ".join(invoke(*ask, *args, QUESTION, exit_code=2).stderr.split()))


@pytest.fixture(scope="module")
def tiles_folder(folder, tmp_path_factory) -> Path:
    """The same model, as a training with VoCo tokens of every tile saves it."""
    path = tmp_path_factory.mktemp("tiles") / folder.name
    shutil.copytree(folder, path)
    VoCoLlamaProcessor.from_pretrained(folder, num_voco_tokens_per_tile=2).save_pretrained(path)
    return path


def test_a_model_that_was_trained_for_tiles_is_asked_so(invoke, folder, tiles_folder, model, processor, tmp_path):
    """By all who are told no number; who is told one of the image reads it whole."""
    photos, cache, store = sorted((folder / "photos").iterdir()), tmp_path / "cache", tmp_path / "store"
    expected = answer_per_tile(model, processor, photos[:2], 2)
    with_model = ["--model", tiles_folder]
    question = ["ask", *with_model, "--max-new-tokens", 6]
    assert invoke(*question, *photos[:2], QUESTION).stdout.strip() == expected
    whole = invoke(*question, "-k", 2, photos[0], QUESTION).stdout.strip()
    assert whole == answer(model, processor, photos[0], 2)
    assert whole != answer_per_tile(model, processor, photos[:1], 2)  # which else could not be told apart here
    printed = invoke("compress", *with_model, "--output", cache, *photos[:2]).stdout
    tiles = re.search(r"2 images in ([\d,]+) tiles, 2 VoCo tokens each", printed).group(1)
    assert invoke(*question, "--cache", cache, "--num-tiles", tiles, QUESTION).stdout.strip() == expected
    refused = invoke(*question, "--cache", cache, QUESTION, exit_code=2).stderr
    assert "has with --num-tiles" in " ".join(refused.split())
    refused = invoke("evaluate", *with_model, exit_code=2).stderr
    assert "give --num-voco-tokens to read them so" in " ".join(refused.split())
    invoke("index", tiles_folder / "photos", "--store", store, *with_model)
    with VoCoStore(store) as opened:
        assert [(entry.num_voco_tokens, entry.is_in_tiles) for entry in opened] == [(2, True)] * len(photos)
    compressor = VoCoCompressor(str(tiles_folder))
    assert (compressor.num_voco_tokens, compressor.sampling.per_tile) == (2, True)
    compressor = VoCoCompressor(str(tiles_folder), 1)
    assert (compressor.num_voco_tokens, compressor.sampling.per_tile) == (1, False)

    trained_so = VoCoLlamaProcessor.from_pretrained(tiles_folder)
    assert DemoEngine(model, trained_so, Limits()).per_tile and not DemoEngine(model, processor, Limits()).per_tile
    with in_process(model, trained_so) as (_, url):
        messages = ask(QUESTION, *[data_url(photo.read_bytes()) for photo in photos[:2]])
        reply = client_of(url).chat.completions.create(model=MODEL, messages=messages, max_tokens=6, temperature=0)
    assert reply.choices[0].message.content.strip() == expected
    shown = processor(
        images=[open_image(photo) for photo in photos[:2]],
        text=f"user: <image><image>{QUESTION}assistant: ",
        num_voco_tokens_per_tile=2,
    )
    assert reply.usage.prompt_tokens == len(shown["input_ids"][0])
    card = make_card(model.config, trained_so, "some/model").text
    assert "num_voco_tokens_per_tile=2))" in card and "voco_cache=cache, num_tiles=len(cache)" in card


def test_images_that_are_not_divided_have_no_tiles(invoke, folder, tmp_path):
    photo = folder / "photos" / "0.png"
    for command in (
        ["ask", photo, QUESTION],
        ["compress", photo, "--output", tmp_path / "cache"],
        ["index", photo.parent, "--store", tmp_path / "store"],
    ):
        failed = invoke(*command, "--num-voco-tokens-per-tile", 2, exit_code=1)
        assert "divide" in failed.stderr and "Traceback" not in failed.stderr
    assert not list(tmp_path.iterdir())


def test_a_large_image_is_one_entry_of_a_store(folder, model, processor, tmp_path):
    photos = [str(path) for path in sorted((folder / "photos").iterdir())]
    indexer = Indexer(tmp_path / "store", model, processor, 2, Sampling(num_frames=2), batch_size=3)
    assert [indexed.error for indexed in indexer.run(indexer.select(photos))] == [None] * len(photos)
    with VoCoStore(tmp_path / "store") as store:
        assert len(list(store)) == len(photos)
        for photo in photos:
            inputs = processor(images=open_image(photo), num_voco_tokens=2, return_tensors="pt")
            torch.testing.assert_close(store.get(hash_file(photo)).keys, model.compress(**inputs).keys)


def test_an_archive_of_tiles(invoke, folder, model, processor, tmp_path):
    """Indexed beside whole images of the same files, and asked about."""
    photos, store = sorted((folder / "photos").iterdir()), tmp_path / "store"
    index = ["index", folder / "photos", "--store", store, "--model", folder]
    per_tile = ["--num-voco-tokens-per-tile", 2]
    printed = invoke(*index, *per_tile, "--batch-size", 3).stdout
    assert "4 entries, 4 images or frames" in printed
    with VoCoStore(store) as opened:
        for photo in photos:
            inputs = processor(images=open_image(photo), num_voco_tokens_per_tile=2, return_tensors="pt")
            torch.testing.assert_close(opened.get(hash_file(photo)).keys, model.compress(**inputs).keys)
        written = opened.nbytes
    assert "4 entries" in invoke(*index, *per_tile).stdout  # all of them known
    with VoCoStore(store) as opened:
        assert opened.nbytes == written

    assert "8 entries, 8 images or frames" in invoke(*index, "-k", 2).stdout
    ask = ["ask", "--model", folder, "--max-new-tokens", 6, "--store", store, "--image", "0.png"]
    assert invoke(*ask, "-k", 2, QUESTION).stdout.strip() == answer(model, processor, photos[0], 2)
    expected = answer_per_tile(model, processor, [photos[0], photos[2]], 2)
    assert invoke(*ask, "--image", "2.png", *per_tile, QUESTION).stdout.strip() == expected
    assert "(k=2 tiles, k=2)" in invoke(*ask, QUESTION, exit_code=2).stderr
    missing = invoke(*ask, "--num-voco-tokens-per-tile", 3, QUESTION, exit_code=2).stderr
    assert "3 VoCo tokens of every tile" in " ".join(missing.split())
    assert "images: 8" in invoke("store", "info", store).stdout


def test_a_pipeline_of_tiles(folder, model, processor, tmp_path):
    """Files and arrays, an entry of all of its tiles each, which a store takes in beside whole images."""
    photos = sorted((folder / "photos").iterdir())
    compressor = VoCoCompressor(str(folder), num_voco_tokens_per_tile=2, batch_size=3)
    values = [*(photo.read_bytes() for photo in photos), np.asarray(open_image(photos[0]))]
    table = compressor({"image": values, "path": [*map(str, photos), "of an array.mp4"]})
    rows = table.to_pylist()
    assert [row["error"] for row in rows] == [None] * 5 and {row["sampling"] for row in rows} == {TILES}
    for row, photo in zip(rows, [*photos, photos[0]]):
        inputs = processor(images=open_image(photo), num_voco_tokens_per_tile=2, return_tensors="pt")
        expected = model.compress(**inputs)
        found = cache_from_row(row)
        assert found.token_counts == expected.token_counts
        torch.testing.assert_close(found.keys, expected.keys, atol=1e-5, rtol=1e-4)
    parquet = tmp_path / "rows.parquet"
    pq.write_table(table.drop_columns("error"), parquet)
    assert not any(error for _, error in import_parquet([str(parquet)], tmp_path / "store", compressor.fingerprint))
    with VoCoStore(tmp_path / "store") as store:
        assert all(entry.is_in_tiles for entry in store) and len(list(store)) == 5


def test_what_a_pipeline_of_tiles_refuses(folder, tmp_path):
    with pytest.raises(ValueError, match="num_voco_tokens or num_voco_tokens_per_tile, not both"):
        VoCoCompressor(str(folder), 2, num_voco_tokens_per_tile=2)
    with pytest.raises(ValueError, match="an image processor that divides images"):
        VoCoCompressor(str(save_checkpoint(tmp_path, seed=0)), num_voco_tokens_per_tile=2)


def test_tiles_that_repeat_are_stored_once(model, tmp_path):
    images = random_images(model, [(28, 56), (28, 56)])
    images["pixel_values"][1, 2] = images["pixel_values"][0, 1]
    cache = model.compress(**images, num_voco_tokens_per_tile=1)
    tiles = [Content.of_pixels(tile) for tile in images["pixel_values"].flatten(0, 1)]
    with VoCoStore(tmp_path / "store", model.fingerprint()) as store:
        store.add(tiles, list(cache))
        assert len(list(store)) == 5 and len(tiles) == 6


def test_server(folder, model, processor):
    photo = folder / "photos" / "0.png"
    with in_process(model, processor) as (_, url):
        reply = client_of(url).chat.completions.create(
            model=MODEL,
            messages=ask(QUESTION, data_url(photo.read_bytes())),
            max_tokens=6,
            temperature=0,
            extra_body={"num_voco_tokens": 2},
        )
    assert reply.choices[0].message.content.strip() == answer(model, processor, photo, 2)


def test_server_with_voco_tokens_of_every_tile(folder, model, processor, tmp_path):
    """As `generate`; kept apart from whole images of as many tokens, in memory and over a restart."""
    photos = sorted((folder / "photos").iterdir())[:2]

    def reply(url: str, shown: list[Path], **numbers: int):
        response = client_of(url).chat.completions.create(
            model=MODEL,
            messages=ask(QUESTION, *[data_url(photo.read_bytes()) for photo in shown]),
            max_tokens=6,
            temperature=0,
            extra_body=numbers,
        )
        text, usage = response.choices[0].message.content.strip(), response.usage
        return text, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens

    tiles = [count_image_tiles(model.config, (height, width)) for width, height in SIZES[:2]]
    longer = 2 * (sum(tiles) - len(tiles))
    both, first = (answer_per_tile(model, processor, shown, 2) for shown in (photos, photos[:1]))
    with in_process(model, processor, store=tmp_path) as (_, url):
        whole, length, _ = reply(url, photos, num_voco_tokens=2)
        assert reply(url, photos, num_voco_tokens_per_tile=2) == (both, length + longer, 0)
        assert reply(url, photos[:1], num_voco_tokens_per_tile=2)[::2] == (first, 2 * tiles[0])
        assert reply(url, photos, num_voco_tokens=2) == (whole, length, 4)
    with in_process(model, processor, store=tmp_path) as (_, url):
        assert reply(url, photos, num_voco_tokens_per_tile=2) == (both, length + longer, 2 * sum(tiles))
        assert reply(url, photos, num_voco_tokens=2) == (whole, length, 4)


def test_tiles_that_the_server_refuses(model, processor):
    photo = picture(84, 84)
    file = io.BytesIO()
    photo.save(file, "PNG")
    image = data_url(file.getvalue())

    def refusal(url: str, messages: list[dict], **numbers: int) -> str:
        with pytest.raises(openai.BadRequestError) as error:
            client_of(url).chat.completions.create(model=MODEL, messages=messages, extra_body=numbers)
        return error.value.body["message"]

    with in_process(model, processor) as (_, url):
        messages = ask(QUESTION, image)
        for number in (0, 577, "2", True):
            assert "num_voco_tokens_per_tile must be an" in refusal(url, messages, num_voco_tokens_per_tile=number)
        twice = refusal(url, messages, num_voco_tokens=2, num_voco_tokens_per_tile=2)
        assert "num_voco_tokens or num_voco_tokens_per_tile, not both" in twice
        # Fits with one tile an image
        messages = ask(QUESTION, *[image] * 16)
        assert "this model reads at most" in refusal(url, messages, num_voco_tokens_per_tile=64)


def test_a_store_with_other_tiles_than_an_image_has(folder, model, processor, tmp_path):
    """Who asks about it is told so, and nobody else."""
    photos = sorted((folder / "photos").iterdir())[:2]
    inputs = processor(images=open_image(photos[0]), num_voco_tokens_per_tile=1, return_tensors="pt")
    made_by = with_images(model.fingerprint(), processor.image_processor)
    cache = model.compress(**inputs)[:1]
    cache.fingerprint = made_by
    with VoCoStore(tmp_path, made_by) as store:
        store.add([Content(hash_file(photos[0]), TILES)], [cache])
    with in_process(model, processor, store=tmp_path) as (_, url):
        create = client_of(url).chat.completions.create
        options = {"model": MODEL, "max_tokens": 6, "temperature": 0, "extra_body": {"num_voco_tokens_per_tile": 1}}
        with pytest.raises(openai.InternalServerError):
            create(messages=ask(QUESTION, data_url(photos[0].read_bytes())), **options)
        reply = create(messages=ask(QUESTION, data_url(photos[1].read_bytes())), **options)
        assert reply.choices[0].message.content.strip() == answer_per_tile(model, processor, photos[1:], 1)


def test_demo(folder, model, processor, tmp_path):
    engine = DemoEngine(model, processor, Limits(max_tokens=6))
    photo = folder / "photos" / "0.png"
    source, _ = engine.open(str(photo), "me", 2)
    *_, last = engine.ask(source, 2, QUESTION)
    assert last.text == answer(model, processor, photo, 2)
    tiles = count_image_tiles(model.config, (40, 90))
    apart = engine.compress(source, 2, per_tile=True)
    assert apart.num_tokens == 2 * tiles > engine.compress(source, 2).num_tokens
    *_, last = engine.ask(source, 2, QUESTION, per_tile=True)
    assert last.text == answer_per_tile(model, processor, [photo], 2)
    ((_, _, compared),) = engine.compare(source, QUESTION, [2], per_tile=True)
    assert compared.text == last.text
    saved, _ = engine.open_cache(str(engine.save(source, 2, str(tmp_path), per_tile=True)), "me")
    assert saved.num_images == tiles and saved.num_voco_tokens == 2 * tiles
    reading, uncompressed = engine.ask_uncompressed(source, QUESTION)
    assert reading.num_tokens == count_vision_tokens(model.config, (40, 90)) and uncompressed.is_done
    engine.warm_up()


def test_evaluation(model, processor):
    results = evaluate_scenes(model, processor, "validation", num_voco_tokens=[1], limit=4, progress=False)
    assert results is not None


@torch.no_grad()
@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_offloaded_weights(folder, model, processor, placement, tmp_path):
    """The newline is a parameter of the model itself, which nobody brings but its own forward pass."""
    inputs = processor(images=picture(90, 40), text="<image>a", num_voco_tokens=2, return_tensors="pt")
    expected, compressed = (
        model.generate(**inputs, max_new_tokens=4),
        model.compress(inputs["pixel_values"], 2, image_sizes=inputs["image_sizes"]),
    )
    offloaded = VoCoLlamaForConditionalGeneration.from_pretrained(folder).eval()
    if placement == "cpu":
        cpu_offload(offloaded, execution_device=torch.device("cpu"))
    else:
        disk_offload(offloaded, tmp_path, execution_device=torch.device("cpu"))
    assert torch.equal(offloaded.generate(**inputs, max_new_tokens=4), expected)
    found = offloaded.compress(inputs["pixel_values"], 2, image_sizes=inputs["image_sizes"])
    torch.testing.assert_close(found.keys, compressed.keys)
    assert found.fingerprint == compressed.fingerprint
