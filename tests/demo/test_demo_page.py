"""The page as a visitor meets it: a real server and a real browser."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from demo.conftest import find_browser, free_port, running
from modeling.helpers import TILED, build_processor, tiny_model
from modeling.test_large_processing import picture
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import voco_llama_hf
from voco_llama_hf import VoCoCache
from voco_llama_hf.demo.examples import EMBEDDED_EXAMPLES


FEW, CROWDED, FILM = (example.path for example in EMBEDDED_EXAMPLES)
TIMEOUT = 120_000  # ms, of a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_browser()
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"]) as running,
    ):
        yield running


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    """A new visit. Nothing may go wrong in its scripts, and nothing may be asked of other servers."""
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT)
    expect.set_options(timeout=TIMEOUT)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: problems.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    page.goto(address)
    expect(page.locator("#ask")).to_be_visible()
    yield page
    page.close()
    assert problems == []


def drop(page: Page, path: Path, where: str = "#upload") -> None:
    page.set_input_files(f"{where} input[type=file]", path)


def ask(page: Page, question: str) -> None:
    page.fill("#question textarea", question)
    page.click("#ask")


def expect_answer(page: Page, answer: str) -> None:
    expect(page.locator("#answer b")).to_have_text(answer)


def expect_error(page: Page, message: str) -> None:
    expect(page.locator(".toast-body").filter(has_text=message).first).to_be_visible()


def vision_ms(page: Page, rows: str) -> list[str]:
    return page.locator(f"#ledger tr.{rows} .vision-ms").all_inner_texts()


def test_drop_and_ask(page):
    drop(page, FEW)
    expect(page.locator('#picture [data-voco-tokens="2"]')).to_contain_text("64 vision tokens")
    expect(page.locator("#picture")).to_contain_text("32× smaller")
    ask(page, "What colour is the circle?")
    expect_answer(page, "orange")
    ask(page, "Where is the orange circle?")
    expect_answer(page, "middle right")
    expect(page.locator("#ledger tr.question")).to_have_count(2)
    assert vision_ms(page, "made") != ["0 ms"]
    assert vision_ms(page, "question") == ["0 ms", "0 ms"]
    # Another k of the same picture
    page.get_by_label("8", exact=True).check()
    expect(page.locator('#picture [data-voco-tokens="8"]')).to_contain_text("8× smaller")
    expect(page.locator("#ledger tr.made")).to_have_count(2)


def test_compare_and_example_questions(page):
    page.get_by_role("button", name="A crowded scene").click()
    page.get_by_role("button", name="What shape is red?").click()
    expect_answer(page, "circle")
    page.get_by_role("tab", name="Compare").click()
    # The tab is made when it is opened, and then shows what is proposed
    line = page.locator("#compared-question textarea")
    expect(line).to_have_value("What colour is the cross?")
    line.fill("What shape is red?")
    page.click("#compare")
    expect(page.locator("[data-way]")).to_have_count(4)
    for way in ("k = 2", "k = 8", "uncompressed"):
        expect(page.locator(f'[data-way="{way}"] .answer')).to_have_text("circle")
    assert page.locator('[data-way="k = 2"] .vision-ms').inner_text() == "0 ms"
    assert page.locator('[data-way="uncompressed"] .vision-ms').inner_text() != "0 ms"


def test_a_video(page):
    drop(page, FILM)
    expect(page.locator('#picture [data-voco-tokens="16"]')).to_contain_text("8 frames")
    expect(page.locator("#picture img")).to_have_count(8)
    ask(page, "Does the white star move left or right?")
    expect_answer(page, "right")


def test_bad_uploads(page, tmp_path):
    ask(page, "What colour is the circle?")
    expect_error(page, "there is no picture yet")
    (tmp_path / "broken.png").write_bytes(FEW.read_bytes()[:500])
    drop(page, tmp_path / "broken.png")
    expect_error(page, "broken.png is damaged")
    Image.new("1", (2000, 501)).save(tmp_path / "wide.png")
    drop_next(page, tmp_path / "wide.png")
    expect_error(page, "wide.png is too large: 2000x501, at most 1,000,000 pixels")
    (tmp_path / "heavy.png").write_bytes(bytes(1_200_000))
    drop_next(page, tmp_path / "heavy.png")
    expect_error(page, "exceed the maximum allowed size")
    # And the page goes on
    page.get_by_role("button", name="A few objects").click()
    ask(page, "What colour is the circle?")
    expect_answer(page, "orange")


def drop_next(page: Page, path: Path) -> None:
    """Takes the last file away first, as a visitor does."""
    page.locator("#upload").get_by_label("Clear").click()
    drop(page, path)


def test_save_and_load(page, browser, address, tmp_path):
    page.get_by_role("button", name="A few objects").click()
    expect(page.locator('[data-voco-tokens="2"]')).to_be_visible()
    page.get_by_role("tab", name="Save and load").click()
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "few-k2.safetensors"
    download.value.save_as(saved := tmp_path / "mine.safetensors")

    foreign = VoCoCache.load(saved)
    foreign.fingerprint["weights"] = "0" * 64
    foreign.save(tmp_path / "foreign.safetensors")
    drop(page, tmp_path / "foreign.safetensors", "#load")
    expect_error(page, "foreign.safetensors was made by another model than the one shown here")
    page.reload()
    page.get_by_role("tab", name="Save and load").click()
    (tmp_path / "cut.safetensors").write_bytes(saved.read_bytes()[:-5])
    drop(page, tmp_path / "cut.safetensors", "#load")
    expect_error(page, "cut.safetensors is not a readable safetensors file")
    page.reload()
    page.get_by_role("tab", name="Save and load").click()
    drop(page, saved, "#load")
    expect(page.locator('[data-voco-tokens="2"]')).to_contain_text("Loaded from mine.safetensors")
    page.get_by_role("tab", name="Ask").click()
    ask(page, "What colour is the circle?")
    expect_answer(page, "orange")
    assert vision_ms(page, "question") == ["0 ms"]


def test_text_stays_text(page, tmp_path):
    hostile = "<img src=x onerror=document.title='taken'> ${document.title='taken'} {{value}}"
    page.get_by_role("button", name="A few objects").click()
    ask(page, hostile)
    expect(page.locator("#ledger tr.question td").first).to_have_text(hostile)
    assert page.title() == "VoCo-LLaMA"


# What can be read and sent without the page


def upload(client: httpx2.Client, name: str, content: bytes) -> httpx2.Response:
    return client.post("/gradio_api/upload", files={"files": (name, content)})


@pytest.fixture
def client(address) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=address, timeout=300) as client:
        yield client


def test_nothing_outside_the_uploads_is_served(client, address):
    """Though the operator's environment allows everything to be."""
    (path,) = upload(client, "few.png", FEW.read_bytes()).json()
    assert client.get(f"/gradio_api/file={path}").content == FEW.read_bytes()
    own = voco_llama_hf.__file__
    names = ["/etc/passwd", "//etc/passwd", "%2Fetc%2Fpasswd", f"{path}/../../../../etc/passwd", "/proc/self/environ"]
    names += [own, str(FEW), "pyproject.toml", f"{address}/config", "http://example.com/", "file:///etc/passwd", "\0"]
    for route in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/gradio_api/proxy="):
        for name in names:
            # As it stands: clients clean such addresses up
            target = (route + name).encode().replace(b"\0", b"%00")
            response = client.get(address, extensions={"target": target})
            assert response.status_code in (403, 404), (route, name, response.status_code)
            assert "root:" not in response.text and "PATH=" not in response.text


def call(client: httpx2.Client, path: str) -> str:
    """What the endpoint answers that compresses, for a path of this server."""
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, 2]
    event = client.post("/gradio_api/call/compress", json={"data": data}).json()["event_id"]
    return client.get(f"/gradio_api/call/compress/{event}").text


def test_voco_tokens_of_every_tile(browser, address, tmp_path):
    """Of a model that divides images, as it was trained unless the box is unticked; another has no such box."""
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT)
    expect.set_options(timeout=TIMEOUT)
    page.goto(address)
    expect(page.locator("#ask")).to_be_visible()
    expect(page.locator("#per-tile")).to_have_count(0)
    processor = build_processor("llava_next")
    tiny_model(voco_token_id=processor.image_token_id, **TILED["llava_next"]).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    type(processor).from_pretrained(tmp_path, num_voco_tokens_per_tile=2).save_pretrained(tmp_path)
    shown = picture(84, 84)
    shown.save(tmp_path / "large.png")
    num_tiles = len(processor(images=shown, num_voco_tokens_per_tile=2, return_tensors="pt")["pixel_values"])
    command = ["-m", "voco_llama_cli", "demo", str(tmp_path), "--max-tokens", "4", "--port", str(free_port())]
    with running(*command) as (_, url):
        page.goto(url)
        drop(page, tmp_path / "large.png")
        expect(page.locator("#per-tile input")).to_be_checked()
        for is_ticked in (True, False, True):
            page.set_checked("#per-tile input", is_ticked)
            tokens = 2 * num_tiles if is_ticked else 2
            expect(page.locator(f'#picture [data-voco-tokens="{tokens}"]')).to_be_visible()
        expect(page.locator("#ledger")).to_contain_text("k = 2 a tile")
        ask(page, "What is it?")
        expect(page.locator("#ledger tr.question")).to_have_count(1)
        page.close()


def test_paths_and_addresses_as_arguments_are_refused(client, address):
    (path,) = upload(client, "few.png", FEW.read_bytes()).json()
    answer = call(client, path)
    assert "event: complete" in answer and "data-voco-tokens" in answer
    folder = str(Path(path).parent)
    for other in (
        "/etc/passwd",
        str(FEW),
        f"{folder}/../../../etc/passwd",
        f"{address}/config",
        "http://example.com/a.png",
    ):
        answer = call(client, other)
        assert "event: error" in answer and "event: complete" not in answer, (other, answer)
        assert "data-voco-tokens" not in answer and "root:" not in answer


def test_requests_are_bounded(client):
    assert upload(client, "small", bytes(900_000)).status_code == 200
    assert upload(client, "large", bytes(1_050_000)).status_code == 413
    assert upload(client, "larger", bytes(1_500_000)).status_code == 413
    body = json.dumps({"data": ["x" * 2_000_000]})
    assert client.post("/gradio_api/call/compress", content=body).status_code == 413
