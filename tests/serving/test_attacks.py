"""What strangers can send: nothing freezes the server, and what is wrong is said to be so."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
import torch
from serving.conftest import MODEL, ask, asking_for_health, client_of, data_url, in_process, scene

from voco_llama_hf.scenes.still import DESCRIBE
from voco_llama_hf.serving import ImageCache


COLOUR = "What colour is the circle?"


def post(server, body, **options) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(f"{server.url}/chat/completions", content=content, timeout=300, **options)


def test_requests_of_megabytes_do_not_freeze_the_server(server, idle):
    """Each took seconds to minutes, in which nobody else was answered."""
    texts = "who am i? " * 300_000
    attacks = [
        ({"messages": ask(texts)}, 400, "this model reads at most 4096"),
        ({"messages": [{"role": "user", "content": "?"}] * 60_000}, 400, "60,000 messages and parts"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 50_000}]}, 400, "50,001 messages"),
        ({"messages": ask("?"), "stop": ["a" * 900_000] * 4}, 400, "stop must be"),
        (b"[" + b"{}," * 1_000_000 + b"{}]", 413, "more than 500,000 values"),
        (b"[" * 3_000_000, 400, "JSON object"),
        ({"messages": ask("?"), "seed": 10**4000}, 400, "seed must be"),
    ]
    with asking_for_health(server.url, idle) as seconds:
        for body, status, message in attacks:
            if isinstance(body, dict):
                body = {"model": MODEL, **body}
            start = time.monotonic()
            response = post(server, body)
            assert response.status_code == status, response.text[:300]
            assert message in response.json()["error"]["message"]
            assert time.monotonic() - start < 30
    here, elsewhere = map(max, seconds)
    print(f"\n/health at most {1000 * here:.0f} ms, of an idle server {1000 * elsewhere:.0f} ms")
    assert here < 1 + 5 * elsewhere


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"logit_bias": {"3": 5}}, "logit_bias is not supported"),
        ({"modalities": ["audio"]}, "modalities is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported"),
        ({"store": True}, "store is not supported"),
        ({"top_k": 5}, "top_k is not supported"),
        ({"stream_options": {"include_usage": True}}, "for requests with stream"),
        ({"messages": [{"role": "user", "content": "?", "tool_calls": [{}]}]}, "'tool_calls' of a message"),
        ({"seed": 2**63}, "seed must be an integer of 64 bits"),
    ],
)
def test_what_is_not_supported_is_refused(server, change, message):
    response = post(server, {"model": MODEL, "messages": ask("?"), "max_tokens": 1, **change})
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_parameters_that_ask_for_nothing_are_taken(server):
    """As clients and frameworks send them with every request."""
    body = {
        "model": MODEL, "messages": ask("?"), "max_tokens": 1, "n": 1, "tools": [], "tool_choice": "none",
        "user": "me", "logprobs": False, "top_logprobs": None, "response_format": {"type": "text"},
        "presence_penalty": 0, "parallel_tool_calls": True, "metadata": {"a": "b"}, "stop": None,
        "logit_bias": {}, "store": False,
    }  # fmt: skip
    assert post(server, body).status_code == 200
    client = server.client()
    answer = client.chat.completions.create(model=MODEL, messages=ask("Hello?")).choices[0].message
    # What the client makes of an answer is taken back
    messages = [*ask("Hello?"), answer.model_dump(), *ask("Again?")]
    assert client.chat.completions.create(model=MODEL, messages=messages).usage.prompt_tokens > 0


@pytest.mark.parametrize(
    "texts", [("<vo", "co>"), ("<ima", "ge>"), ("<", "video>"), ("a<vo", "co>b"), ("<image", ">\n")]
)
def test_tokens_of_images_put_together_from_two_texts(server, texts):
    for url in ([], [data_url(scene())]):
        messages = ask("?", *url)
        messages[0]["content"] += [{"type": "text", "text": text} for text in texts]
        response = post(server, {"model": MODEL, "messages": messages, "max_tokens": 1})
        assert response.status_code == 400
        assert "send images as parts" in response.json()["error"]["message"]


LONE = [b'"\\ud800"', b'"\\udc00 "', b'"a\\ud83d"', b'"\xed\xa0\x80"']
NUMBERS = [b"NaN", b"Infinity", b"1e400", b"-1e400"]


@pytest.mark.parametrize("value", [*LONE, *NUMBERS, b"[[[["])
def test_values_that_are_none(server, value):
    template = json.dumps({"model": MODEL, "messages": ask("?"), "max_tokens": 1})
    for body in (
        template.replace('"?"', "HERE"),
        template.replace('"user"', "HERE"),
        template.replace('"max_tokens": 1', '"stop": HERE'),
        template.replace('"max_tokens": 1', '"temperature": HERE'),
        template.replace(f'"{MODEL}"', "HERE"),
    ):
        assert "HERE" in body
        response = post(server, body.encode().replace(b"HERE", value))
        assert response.status_code in (400, 404), (body, response.text)


def mutated(value, chance: random.Random):
    """The same with something else somewhere in it."""
    odd = [None, True, -1, 0, 10**30, 0.5, "", "\x00", "<s></s>", "é\u0301🏳️‍🌈", [], {}, [[]], {"": {}}, "x" * 5000]
    if chance.random() < 0.12:
        return chance.choice(odd)
    if isinstance(value, dict):
        value = {key: mutated(item, chance) for key, item in value.items()}
        if value and chance.random() < 0.1:
            del value[chance.choice(list(value))]
        return value
    if isinstance(value, list):
        return [mutated(item, chance) for item in value] * chance.choice([1, 1, 1, 2])
    if isinstance(value, str) and value and chance.random() < 0.2:
        place = chance.randrange(len(value))
        return value[:place] + chance.choice(["", "\n", "<", "�", "%00", "=="]) + value[place + 1 :]
    return value


def attack(server, seed: int) -> int:
    chance = random.Random(seed)
    body = {
        "model": MODEL, "messages": ask("?", data_url(scene())), "max_tokens": 2, "temperature": 1, "top_p": 0.5,
        "stop": ["a"], "seed": 3, "stream": False, "num_voco_tokens": 2, "presence_penalty": 1, "n": 1,
    }  # fmt: skip
    body = mutated(body, chance)
    if isinstance(body, dict) and chance.random() < 0.7:
        body["model"] = MODEL
    response = post(server, body)
    assert response.status_code in (200, 400, 404, 413), (seed, response.status_code, response.text)
    return response.status_code


@pytest.mark.parametrize(
    ("first", "number"), [(0, 150), pytest.param(10_000, 3000, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_mutated_requests_are_answered_or_refused(server, first, number):
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda seed: attack(server, seed), range(first, first + number)))
    print(f"\n{number} mutated requests:", {status: statuses.count(status) for status in sorted(set(statuses))})
    assert {200, 400} <= set(statuses)


def test_host_headers_of_other_names(server):
    for host, is_right in (
        ("evil.example", False), ("evil.example:8000", False), ("127.0.0.1.evil.example", False), ("", False),
        ("localhost.evil.example", False), ("user@localhost", True), ("[::1", False), ("localhost:99", True),
        ("127.0.0.1", True), ("[::1]:80", True), ("LOCALHOST", True), ("192.168.1.5:8000", True),
    ):  # fmt: skip
        response = httpx2.get(f"{server.url}/models", headers={"Host": host}, timeout=300)
        assert response.status_code == (200 if is_right else 400), host


def test_keys_and_names(embedded):
    with in_process(*embedded, api_keys=["one", "zwei"], allowed_hosts=["voco.example"]) as (_, url):
        for key, is_right in (("one", True), ("zwei", True), ("on", False), ("x", False), ("ONE", False)):
            headers = {"Host": "voco.example:80", "Authorization": f"Bearer {key}"}
            response = httpx2.get(f"{url}/models", headers=headers, timeout=300)
            assert response.status_code == (200 if is_right else 401), key
        with pytest.raises(openai.AuthenticationError):
            client_of(url, api_key="three").models.list()
        answer = client_of(url, api_key="one").chat.completions.create(model=MODEL, messages=ask("?"), max_tokens=1)
        assert answer.usage.completion_tokens == 1
        assert httpx2.get(url.removesuffix("v1") + "health", timeout=300).status_code == 200


@pytest.mark.parametrize("text", ["{{ raise_exception('never') }}", "{{ 1 / 0 }}", "{% for %}", "{{ 'x' * 10**7 }}"])
def test_templates_that_fail_or_do_not_end(embedded, text):
    """Of every conversation: an error when the server starts. Of some: an error for who sends them."""
    model, processor = embedded
    template = processor.chat_template
    try:
        processor.chat_template = text
        with pytest.raises(ValueError, match=r"chat template|tokens"), in_process(model, processor):
            pass
        if "for" in text:
            return
        processor.chat_template = "{% if messages[0].content[0].text == 'now' %}" + text + "{% endif %}" + template
        with in_process(model, processor) as (_, url):
            client = client_of(url)
            assert client.chat.completions.create(model=MODEL, messages=ask("?"), max_tokens=1).usage
            with pytest.raises(openai.BadRequestError, match=r"chat template|tokens"):
                client.chat.completions.create(model=MODEL, messages=ask("now"), max_tokens=1)
    finally:
        processor.chat_template = template


def test_a_seed_holds_among_24_requests(server):
    client, url = server.client(), data_url(scene("blue", mark=6))

    def draw(seed: int | None) -> str:
        options = {"model": MODEL, "messages": ask(DESCRIBE, url), "temperature": 2, "max_tokens": 12}
        return client.chat.completions.create(**options, seed=seed).choices[0].message.content

    alone = [draw(seed) for seed in range(8)]
    assert len(set(alone)) > 2
    with ThreadPoolExecutor(24) as pool:
        seeds = [*range(8), *[None] * 8, *range(8)]
        among = list(pool.map(draw, seeds))
    assert among[:8] == among[16:] == alone


def test_the_text_of_stop_is_not_part_of_the_answer(server):
    client, url = server.client(), data_url(scene("blue", mark=7))
    options = {"model": MODEL, "messages": ask(COLOUR, url), "max_tokens": 8}
    for stop, expected in (("ue", "bl"), (["xyz", "lue"], "b"), ("blue", ""), ("blues", "blue"), ("e", "blu")):
        answer = client.chat.completions.create(**options, stop=stop)
        chunks = client.chat.completions.create(**options, stop=stop, stream=True)
        streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert answer.choices[0].message.content == streamed == expected
        assert answer.choices[0].finish_reason == "stop"
    short = client.chat.completions.create(**{**options, "max_tokens": 1})
    assert short.choices[0].finish_reason == "length"


def test_a_stream_ends_with_done(server):
    body = {"model": MODEL, "messages": ask("?"), "max_tokens": 3, "stream": True}
    events = post(server, body, headers={"X-Request-Id": "mine"})
    assert events.headers["x-request-id"] == "mine"
    lines = events.text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1])
    assert all(json.loads(line.removeprefix("data: "))["id"] == "mine" for line in lines[:-1])


def test_requests_that_wait_share_a_batch(embedded):
    """In fewer runs of the model than there are requests, each is answered as if it were alone."""
    model, processor = embedded
    urls = [data_url(scene(colour, mark=8)) for colour in ("red", "green", "blue", "yellow")]
    questions = [ask(COLOUR, urls[i % 4]) if i % 3 else ask(COLOUR, urls[i % 4], urls[0]) for i in range(11)]
    questions.append(ask("Hello?"))
    sizes: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    try:
        with in_process(model, processor) as (_, url):
            client = client_of(url)

            def one(messages, max_tokens: int = 6) -> str:
                answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=max_tokens)
                return answer.choices[0].message.content

            alone = [one(messages, 6 + i % 3) for i, messages in enumerate(questions)]
            assert set(sizes) == {1}
            sizes.clear()
            with ThreadPoolExecutor(12) as pool:
                together = list(pool.map(one, questions, [6 + i % 3 for i in range(12)]))
    finally:
        hook.remove()
    assert together == alone
    assert max(sizes) > 1


class TestStore:
    """An image is answered whatever is the matter with the store."""

    @pytest.fixture
    def compress(self, embedded):
        model, _ = embedded
        return lambda: model.compress(torch.ones(1, 3, 64, 64), 2, show_progress=False)

    def cache(self, embedded, path) -> ImageCache:
        return ImageCache(10**6, path, embedded[0].fingerprint())

    def test_a_damaged_entry_is_compressed_again(self, embedded, compress, tmp_path, caplog):
        first, is_known = self.cache(embedded, tmp_path).get_or_compress("a" * 64, 2, compress)
        assert not is_known
        (shard,) = (tmp_path / "shards").glob("*.safetensors")
        content = bytearray(shard.read_bytes())
        content[-20] ^= 1
        shard.write_bytes(content)
        again, is_known = self.cache(embedded, tmp_path).get_or_compress("a" * 64, 2, compress)
        assert not is_known and torch.equal(again.keys, first.keys)
        assert "cannot read from the store" in caplog.text
        stored, is_known = self.cache(embedded, tmp_path).get_or_compress("a" * 64, 2, compress)
        assert is_known and torch.equal(stored.keys, first.keys)

    def test_a_store_that_cannot_be_written(self, embedded, compress, tmp_path, caplog):
        images = self.cache(embedded, tmp_path)
        images.get_or_compress("a" * 64, 2, compress)
        for shard in (tmp_path / "shards").glob("*"):
            shard.unlink()
        (tmp_path / "shards").rmdir()
        (tmp_path / "shards").write_text("no folder")
        for digit in "bcd":
            cache, is_known = images.get_or_compress(digit * 64, 2, compress)
            assert not is_known and len(cache) == 1
        assert len([record for record in caplog.records if "write to" in record.message]) == 1
