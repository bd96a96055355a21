"""The server as its clients meet it: OpenAI's own client, a real process."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from serving.conftest import MODEL, ask, data_url, scene, serving

from voco_llama_hf.scenes.still import DESCRIBE


COLOUR = "What colour is the circle?"


def complete(client, *args, **options):
    return client.chat.completions.create(model=MODEL, messages=ask(*args), max_tokens=8, **options)


def cached(response) -> int:
    return response.usage.prompt_tokens_details.cached_tokens


def text_of(chunks) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_models(server):
    assert [model.id for model in server.client().models.list()] == [MODEL]


def test_an_image_is_compressed_once(server):
    client, url = server.client(), data_url(scene("blue", mark=1))
    first = complete(client, COLOUR, url)
    assert first.choices[0].message.content == "blue"
    assert first.choices[0].finish_reason == "stop"
    assert (cached(first), first.model) == (0, MODEL)
    again = complete(client, "What shape is the blue one?", url)
    assert cached(again) == 1
    assert complete(client, COLOUR, url).choices[0].message.content == "blue"
    # Another k is another image
    wide = [complete(client, COLOUR, url, extra_body={"num_voco_tokens": 8}) for _ in range(2)]
    assert [cached(response) for response in wide] == [0, 8]
    assert wide[0].usage.prompt_tokens == first.usage.prompt_tokens + 7
    both = complete(client, COLOUR, url, data_url(scene("green", mark=1)))
    assert cached(both) == 1 and both.usage.prompt_tokens > first.usage.prompt_tokens


def test_streaming_gives_the_same_answer(server):
    client, url = server.client(), data_url(scene("green", mark=2))
    whole = complete(client, COLOUR, url)
    chunks = list(complete(client, COLOUR, url, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole.choices[0].message.content
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.prompt_tokens_details.cached_tokens) == ([], 1)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in complete(client, COLOUR, url, stream=True))


def test_a_conversation(server):
    client, url = server.client(), data_url(scene("red", mark=3))
    messages = [*ask(COLOUR, url), {"role": "assistant", "content": "red"}]
    messages.append({"role": "user", "content": "What shape is the red one?"})
    response = client.chat.completions.create(model=MODEL, messages=messages, stop=["\n"], temperature=0.7, seed=1)
    assert response.usage.completion_tokens > 0
    assert client.chat.completions.create(model=MODEL, messages=ask("Hello?")).choices[0].message.role == "assistant"


def test_32_clients_at_once(server):
    """Of few images: every one is compressed once, whoever comes first, and all are answered right."""
    colours = ["red", "green", "blue", "yellow"]
    urls = {colour: data_url(scene(colour, mark=4)) for colour in colours}

    def one(number: int):
        colour = colours[number % 4]
        client = server.client()
        if number % 2:
            response = complete(client, COLOUR, urls[colour])
            return colour, response.choices[0].message.content, cached(response)
        chunks = list(complete(client, COLOUR, urls[colour], stream=True, stream_options={"include_usage": True}))
        return colour, text_of(chunks), chunks[-1].usage.prompt_tokens_details.cached_tokens

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(one, range(32)))
    assert all(colour == answer for colour, answer, _ in answers)
    assert sum(tokens for *_, tokens in answers) == 32 - len(colours)


def test_cancelled_streams_make_room(server):
    """As many as the server takes on are opened and left; it goes on answering."""
    client, url = server.client(max_retries=20), data_url(scene(mark=5))
    for _ in range(40):
        stream = complete(client, DESCRIBE, url, stream=True)
        next(iter(stream))
        stream.close()
    assert complete(client, COLOUR, url).choices[0].message.content == "red"


@pytest.mark.parametrize(
    ("status", "change", "message"),
    [
        (400, {"messages": []}, "messages must be a list"),
        (400, {"messages": "hello"}, "messages must be a list"),
        (400, {"messages": [{"content": "no role"}]}, "an object with a role"),
        (400, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "of type text and image_url"),
        (400, {"messages": ask("<image> and <voco>")}, "<image> stands for an image"),
        (400, {"messages": ask("?", "data:image/png;base64,????")}, "is not base64"),
        (400, {"messages": ask("?", data_url(b"no image"))}, "is not an image"),
        (400, {"messages": ask("?", data_url(scene()[:100]))}, "damaged"),
        (400, {"messages": ask("?", "/etc/passwd")}, "must be a data: URL"),
        (400, {"messages": ask("?", "file:///etc/passwd")}, "must be a data: URL"),
        (400, {"messages": ask("?", "http://127.0.0.1/cat.png")}, "does not fetch remote images"),
        (400, {"messages": ask("?", *[data_url(scene())] * 5)}, "may have 4 images, got 5"),
        (413, {"messages": ask("?", data_url(scene(size=1200)))}, "too large: 1200x1200"),
        (413, {"messages": ask("x" * 4_000_001)}, "the request is too large"),
        (400, {"messages": ask("who " * 5000)}, "this model reads at most 4096"),
        (400, {"max_tokens": 1025}, "max_tokens must be an integer from 1 to 1024"),
        (400, {"max_tokens": "many"}, "max_tokens must be an integer"),
        (400, {"temperature": 3}, "temperature must be a number from 0 to 2"),
        (400, {"num_voco_tokens": 0}, "num_voco_tokens must be an integer from 1 to 576"),
        (400, {"n": 2}, "n must be 1"),
        (400, {"generation_config": "{}"}, "generation_config is not supported"),
        (404, {"model": "another"}, "this server has the model"),
        (400, {"colour": "red"}, "colour is not supported"),
    ],
)
def test_malformed_requests(server, status, change, message):
    body = {"model": MODEL, "messages": ask("What?"), "max_tokens": 4, **change}
    response = httpx2.post(f"{server.url}/chat/completions", json=body, timeout=300)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": '])
def test_bodies_that_are_no_json_object(server, content):
    headers = {"Content-Type": "application/json"}
    response = httpx2.post(f"{server.url}/chat/completions", content=content, headers=headers, timeout=300)
    assert response.status_code == 400 and "error" in response.json()


def test_other_routes_of_transformers_are_closed(server):
    base = server.url.removesuffix("/v1")
    for path in ("/load_model", "/reset", "/v1/completions", "/v1/responses"):
        assert httpx2.post(base + path, json={"model": "gpt2"}, timeout=300).status_code == 404
    assert httpx2.get(base + "/health", timeout=300).json() == {"status": "ok"}


def test_errors_of_the_official_client(server):
    with pytest.raises(openai.BadRequestError, match="does not fetch remote images"):
        complete(server.client(), "What?", "https://example.com/cat.png")


def test_a_full_queue_and_a_restart(tmp_path):
    """More than it takes on is turned away at once; a store remembers images over a restart."""
    store, url = tmp_path / "seen.voco", data_url(scene("blue"))
    with serving("--max-queue", "2", "--store", store) as server:
        statuses: list[int] = []

        def one(_: int) -> None:
            try:
                complete(server.client(), COLOUR, url)
                statuses.append(200)
            except openai.RateLimitError as error:
                assert "try again" in json.dumps(error.body)
                statuses.append(429)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429}
        assert complete(server.client(), COLOUR, url).choices[0].message.content == "blue"
    with serving("--store", store) as server:
        response = complete(server.client(), COLOUR, url)
        assert (response.choices[0].message.content, cached(response)) == ("blue", 1)
