"""
`generate` in every mode that transformers has for LLaVA.

The reference is nearly always the single pass (`use_cache=False`) over one row without padding: it shares neither the
compression, nor the cache, nor the batching with what is tested.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import VOCO, pad_rows, random_inputs, random_pixels, random_rows, single_rows, tiny_model
from transformers import (
    Cohere2Config,
    CohereConfig,
    CompileConfig,
    DynamicCache,
    Exaone4Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolLM3Config,
    StaticCache,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from voco_llama_hf import VoCoCache


NEW_TOKENS = 6
TOLERANCE = {"atol": 1e-4, "rtol": 0}

LAYOUTS = [
    ["text:3", "image:2", "text:4"],
    ["image:1", "text:2", "image:3", "text:2"],
    ["text:5"],
    ["text:1", "image:2", "image:1", "text:1"],
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def inputs(model):
    return random_inputs(model, LAYOUTS)


@pytest.fixture(scope="module")
def expected(model, inputs):
    """Greedy answers to the rows of `inputs`."""
    return [greedy_reference(model, row) for row in single_rows(inputs)]


def new_tokens(model, inputs: dict, **kwargs) -> list[list[int]]:
    """What greedy `generate` adds to each row."""
    arguments = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **kwargs}
    length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return model.generate(**inputs, **arguments)[:, length:].tolist()


def single_pass(model, row: dict, ids: list[int]) -> torch.Tensor:
    """Logits of every position of one row that goes on with `ids`, by the single pass."""
    ids = torch.cat([row["input_ids"], torch.tensor([ids], dtype=torch.long)], dim=1)
    with torch.no_grad():
        return model(**{**row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False).logits[0]


def greedy_reference(model, row: dict, num_tokens: int = NEW_TOKENS) -> list[int]:
    ids: list[int] = []
    for _ in range(num_tokens):
        ids.append(int(single_pass(model, row, ids)[-1].argmax()))
    return ids


def beam_reference(model, row: dict, num_beams: int, num_tokens: int) -> list[tuple[float, list[int]]]:
    """Mean log-probability and tokens of each beam, the best first."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(num_tokens):
        longer = []
        for score, ids in beams:
            best = single_pass(model, row, ids)[-1].log_softmax(-1).topk(num_beams)
            longer += [(score + value.item(), [*ids, int(token)]) for value, token in zip(*best)]
        beams = sorted(longer, reverse=True)[:num_beams]
    return [(score / num_tokens, ids) for score, ids in beams]


def assert_follows(model, outputs, rows: list[dict]):
    """The logits of every step of `generate` are those of the single pass over what it wrote."""
    assert len(outputs.sequences) == len(rows)
    written = outputs.sequences[:, -len(outputs.logits) :].tolist()
    for r, (row, ids) in enumerate(zip(rows, written)):
        logits = single_pass(model, row, ids[:-1])[-len(ids) :]
        torch.testing.assert_close(torch.stack([step[r] for step in outputs.logits]), logits, **TOLERANCE)


def assert_greedy(model, inputs: dict, rows: list[dict], num_tokens: int = NEW_TOKENS, **kwargs):
    """`generate(**inputs, **kwargs)` answers as the single pass does to `rows`, one by one."""
    arguments = {"do_sample": False, "max_new_tokens": num_tokens, **kwargs}
    outputs = model.generate(**inputs, **arguments, return_dict_in_generate=True, output_logits=True)
    assert_follows(model, outputs, rows)
    best = torch.stack(outputs.logits, dim=1).argmax(-1)
    assert torch.equal(outputs.sequences[:, -num_tokens:], best)


def with_cache(model, inputs: dict) -> dict:
    """The same inputs, with the images compressed already."""
    cache = model.compress(inputs["pixel_values"], inputs["num_voco_tokens"])
    return {name: value for name, value in inputs.items() if name != "pixel_values"} | {"voco_cache": cache}


def encoded_images(model, run) -> int:
    """How many images went through the vision tower during `run()`."""
    sizes = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return sum(sizes)


# Greedy search


def test_greedy_batch_equals_its_rows_one_by_one(model, inputs, expected):
    assert new_tokens(model, inputs) == expected
    assert [new_tokens(model, row)[0] for row in single_rows(inputs)] == expected


def test_answers_depend_on_the_images(model, inputs, expected):
    other = {**inputs, "pixel_values": random_pixels(model, len(inputs["pixel_values"]), seed=7)}
    answers = new_tokens(model, other)
    assert [answer == same for answer, same in zip(answers, expected)] == [False, False, True, False]


def test_inputs_stay_as_they_were(model, inputs, expected):
    before = {name: value.clone() for name, value in inputs.items()}
    new_tokens(model, inputs, num_beams=2)
    assert all(torch.equal(inputs[name], before[name]) for name in before)
    assert new_tokens(model, inputs) == expected


def test_without_num_voco_tokens_they_are_divided_evenly(model):
    inputs = random_inputs(model, [["image:3", "text:4"], ["text:2", "image:3", "text:1", "image:3", "text:2"]])
    rows = single_rows(inputs)
    assert inputs.pop("num_voco_tokens").tolist() == [3, 3, 3]
    assert_greedy(model, inputs, rows)
    assert_greedy(model, inputs, rows, num_voco_tokens=3)
    assert_greedy(model, inputs, rows, num_voco_tokens=[3, 3, 3])


def test_rows_stop_at_their_own_end(model, inputs, expected):
    end = expected[0][2]
    answers = new_tokens(model, inputs, eos_token_id=end)
    for answer, full in zip(answers, expected):
        stop = full.index(end) + 1 if end in full else len(full)
        assert answer == full[:stop] + [0] * (len(answer) - stop)


part = st.one_of(st.integers(1, 3).map("text:{}".format), st.integers(1, 3).map("image:{}".format))
layout = st.tuples(st.lists(part, max_size=4), st.integers(1, 3)).map(lambda row: [*row[0], f"text:{row[1]}"])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(layout, min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 3))
def test_any_layout(layouts, chunk_size, seed):
    model = tiny_model(seed)
    inputs = random_inputs(model, layouts, seed=seed)
    rows = single_rows(inputs)
    assert_greedy(model, inputs, rows, 3)
    assert_greedy(model, inputs, rows, 3, prefill_chunk_size=chunk_size)
    if "pixel_values" in inputs:
        assert_greedy(model, with_cache(model, inputs), rows, 3)


# Lengths


def test_prefill_leaves_nothing_but_the_short_sequence(model, inputs):
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    batch_size, length = inputs["input_ids"].shape
    assert cache.get_seq_length() == length
    assert [layer.keys.shape for layer in cache.layers] == [(batch_size, 2, length, 16)] * 3
    assert [layer.values.shape for layer in cache.layers] == [(batch_size, 2, length, 16)] * 3


@pytest.mark.parametrize("prepare", [lambda model, inputs: inputs, with_cache], ids=["pixels", "cache"])
def test_lengths_are_those_of_the_short_sequence(model, inputs, prepare):
    length = inputs["input_ids"].shape[1]
    arguments = {"do_sample": False, "max_length": length + 4, "return_dict_in_generate": True}
    outputs = model.generate(**prepare(model, inputs), **arguments)
    assert outputs.sequences.shape == (len(LAYOUTS), length + 4)
    assert outputs.past_key_values.get_seq_length() == length + 3


def test_images_are_encoded_once(model, inputs):
    num_images = len(inputs["pixel_values"])
    assert encoded_images(model, lambda: new_tokens(model, inputs)) == num_images
    assert encoded_images(model, lambda: new_tokens(model, inputs, num_beams=3)) == num_images
    assert encoded_images(model, lambda: new_tokens(model, inputs, prefill_chunk_size=2)) == num_images
    cached = with_cache(model, inputs)
    assert encoded_images(model, lambda: new_tokens(model, cached)) == 0


# Images in front of all text, and padding among them; the third column of the batch has text


FRONT_LAYOUTS = [["image:2", "text:4"], ["image:1", "image:3", "text:2"], ["image:2", "text:3", "image:1", "text:1"]]


@pytest.mark.parametrize("name", ["llama", "mistral, small window", "gemma2"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"past_key_values": DynamicCache}],
    ids=["dynamic", "static", "chunks", "cache of the caller"],
)
@pytest.mark.parametrize("prepare", [lambda model, inputs: inputs, with_cache], ids=["pixels", "cache"])
def test_images_in_front_of_text(name, arguments, prepare):
    model = tiny_model(**ARCHITECTURES[name])
    inputs = random_inputs(model, FRONT_LAYOUTS)
    arguments = {key: value() if value is DynamicCache else value for key, value in arguments.items()}
    assert_greedy(model, prepare(model, inputs), single_rows(inputs), 3, **arguments)


@torch.no_grad()
def test_images_in_front_of_text_are_not_run_again(model):
    lengths = []
    layer = model.model.language_model.layers[0]
    inputs = random_inputs(model, FRONT_LAYOUTS)
    tokens = inputs["attention_mask"].bool()
    expected = model(**inputs, use_cache=False).logits
    cached = with_cache(model, inputs)
    with layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1])):
        new_tokens(model, cached, max_new_tokens=2)
        outputs = model(**cached, use_cache=True)
        complete = model(**cached, use_cache=True, output_hidden_states=True)
    assert lengths == [5, 1, 5, 7]
    assert outputs.logits.shape == expected.shape
    text = tokens & (inputs["input_ids"] != VOCO)
    torch.testing.assert_close(outputs.logits[text], expected[text], **TOLERANCE)
    assert [states.shape[1] for states in complete.hidden_states] == [7] * 4
    # Hidden states of VoCo tokens are known to those who have the pixels
    torch.testing.assert_close(model(**inputs, use_cache=True).logits[tokens], expected[tokens], **TOLERANCE)


# Sampling


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_sampling(model, inputs, num_return_sequences):
    arguments = {
        "do_sample": True,
        "temperature": 1.5,
        "top_k": 0,
        "max_new_tokens": NEW_TOKENS,
        "num_return_sequences": num_return_sequences,
        "suppress_tokens": [VOCO],
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    set_seed(3)
    outputs = model.generate(**inputs, **arguments)
    assert_follows(model, outputs, [row for row in single_rows(inputs) for _ in range(num_return_sequences)])
    assert len(set(map(tuple, outputs.sequences.tolist()))) == len(outputs.sequences)
    set_seed(3)
    assert torch.equal(model.generate(**with_cache(model, inputs), **arguments).sequences, outputs.sequences)


def test_a_sampled_voco_token_is_an_ordinary_token(model, inputs):
    """An answer may hold a `<voco>` token; it is no image."""

    class Force:
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([VOCO]), 0.0)

    def generate(**kwargs):
        return model.generate(**inputs, do_sample=False, max_new_tokens=4, logits_processor=[Force()], **kwargs)

    length = inputs["input_ids"].shape[1]
    assert (generate()[:, length:] == VOCO).all()
    outputs = generate(return_dict_in_generate=True, output_logits=True)
    # The same tokens through the cache, one by one
    with torch.no_grad():
        prompt = model(**inputs, use_cache=True, position_ids=positions(inputs["attention_mask"]))
    torch.testing.assert_close(outputs.logits[0], prompt.logits[:, -1], **TOLERANCE)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(LAYOUTS), 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        rest = model(
            input_ids=torch.full((len(LAYOUTS), 3), VOCO),
            attention_mask=mask,
            position_ids=positions(mask)[:, -3:],
            past_key_values=prompt.past_key_values,
        )
    torch.testing.assert_close(torch.stack(outputs.logits[1:], dim=1), rest.logits, **TOLERANCE)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


# Beam search


@pytest.mark.parametrize("prepare", [lambda model, inputs: inputs, with_cache], ids=["pixels", "cache"])
def test_beam_search_equals_a_search_by_hand(model, inputs, prepare):
    outputs = model.generate(
        **prepare(model, inputs),
        do_sample=False,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = [beam for row in single_rows(inputs) for beam in beam_reference(model, row, 3, 4)[:2]]
    length = inputs["input_ids"].shape[1]
    assert outputs.sequences[:, length:].tolist() == [ids for _, ids in beams]
    torch.testing.assert_close(outputs.sequences_scores, torch.tensor([score for score, _ in beams]), **TOLERANCE)


def test_beam_search_with_an_end_equals_its_rows_one_by_one(model, inputs, expected):
    arguments = {"num_beams": 4, "num_return_sequences": 4, "eos_token_id": expected[0][1], "length_penalty": 0.5}
    answers = new_tokens(model, inputs, **arguments)
    rows = [answer for row in single_rows(inputs) for answer in new_tokens(model, row, **arguments)]
    longest = max(map(len, answers))
    assert answers == [row + [0] * (longest - len(row)) for row in rows]


def test_beam_sampling_and_chunks(model, inputs):
    arguments = {"num_beams": 2, "do_sample": True, "max_new_tokens": NEW_TOKENS}
    answers = []
    for images, extra in ((inputs, {}), (with_cache(model, inputs), {}), (inputs, {"prefill_chunk_size": 3})):
        set_seed(11)
        answers.append(model.generate(**images, **arguments, **extra))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_beams_from_inputs_embeds(model, inputs):
    arguments = {"do_sample": False, "num_beams": 3, "max_new_tokens": 4}
    from_ids = model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**as_embeds(model, inputs), **arguments), from_ids)


# Assisted decoding


def assistant_like(model, kind: str):
    assistants = {
        "same weights": lambda: copy.deepcopy(model),
        "other weights": lambda: tiny_model(seed=1),
        "other shape": lambda: tiny_model(seed=2, text={"num_hidden_layers": 2, "hidden_size": 32}),
    }
    assistant = assistants[kind]()
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


@pytest.mark.parametrize("kind", ["same weights", "other weights", "other shape"])
@pytest.mark.parametrize("prepare", [lambda model, inputs: inputs, with_cache], ids=["pixels", "cache"])
def test_assisted_decoding_equals_greedy(model, inputs, expected, kind, prepare):
    for row, answer in zip(single_rows(inputs), expected):
        images = prepare(model, row) if "pixel_values" in row else row
        assert new_tokens(model, images, assistant_model=assistant_like(model, kind)) == [answer]


def test_prompt_lookup_equals_greedy(model):
    rows, counts = random_rows([["text:3", "image:2", "text:4"]])
    row = rows[0] + rows[0][-4:] + rows[0][-4:-1]
    inputs = {**pad_rows([row]), "pixel_values": random_pixels(model, 1), "num_voco_tokens": torch.tensor(counts)}
    assert new_tokens(model, inputs, prompt_lookup_num_tokens=3) == [greedy_reference(model, inputs)]


def test_prompt_lookup_may_propose_voco_tokens(model):
    """The prompt ends with what stood in front of an image, as every turn of a chat begins alike."""
    inputs = {
        **pad_rows([[5, 6, VOCO, VOCO, 7, 8, 5, 6]]),
        "pixel_values": random_pixels(model, 1),
        "num_voco_tokens": torch.tensor([2]),
    }
    assert new_tokens(model, inputs, prompt_lookup_num_tokens=3) == [greedy_reference(model, inputs)]


def test_assisted_decoding_with_a_sliding_window():
    model = tiny_model(text_class=MistralConfig, text={"sliding_window": 6})
    inputs = random_inputs(model, [["text:3", "image:2", "text:9"]])
    answers = [greedy_reference(model, inputs, 12)]
    arguments = {"max_new_tokens": 12}
    assert new_tokens(model, inputs, assistant_model=assistant_like(model, "same weights"), **arguments) == answers
    assert new_tokens(model, inputs, prompt_lookup_num_tokens=2, **arguments) == answers


# Caches


def test_cache_of_the_caller(model, inputs, expected):
    """Also one that learns its layers only as they come."""
    assert new_tokens(model, inputs, past_key_values=DynamicCache()) == expected
    assert new_tokens(model, inputs, past_key_values=DynamicCache(config=model.config.text_config)) == expected


@pytest.mark.parametrize("prepare", [lambda model, inputs: inputs, with_cache], ids=["pixels", "cache"])
def test_static_cache(model, inputs, expected, prepare):
    images = prepare(model, inputs)
    assert new_tokens(model, images, cache_implementation="static") == expected
    assert new_tokens(model, images, cache_implementation="static", num_beams=2) == new_tokens(
        model, inputs, num_beams=2
    )


@pytest.mark.parametrize(
    "backend, fullgraph, chunk_size",
    [
        ("eager", True, None),
        ("eager", False, 5),
        pytest.param("inductor", True, None, marks=pytest.mark.slow),
    ],
)
def test_compiled_decoding(inputs, expected, backend, fullgraph, chunk_size):
    """Decoding is one graph; a chunked prefill, which is compiled as well, may break into several."""
    config = CompileConfig(backend=backend, fullgraph=fullgraph, mode=None)
    config._compile_all_devices = True
    model = tiny_model()
    answers = new_tokens(
        model, inputs, cache_implementation="static", compile_config=config, prefill_chunk_size=chunk_size
    )
    assert answers == expected
    assert model._compiled_call is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="an offloaded cache needs CUDA")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_cache(inputs, expected, kind):
    model = tiny_model().cuda()
    images = {name: value.cuda() for name, value in inputs.items()}
    assert new_tokens(model, images, cache_implementation=kind) == expected


@pytest.mark.parametrize("prepare", [lambda model, inputs: inputs, with_cache], ids=["pixels", "cache"])
def test_quantized_cache(model, inputs, prepare):
    """The prefill sees exact keys and values; later steps see rounded ones."""
    pytest.importorskip("optimum.quanto")
    arguments = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
    arguments |= {"output_logits": True, "suppress_tokens": [VOCO]}
    cache_config = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}
    exact = model.generate(**inputs, **arguments)
    rounded = model.generate(
        **prepare(model, inputs), **arguments, cache_implementation="quantized", cache_config=cache_config
    )
    assert rounded.sequences.shape == exact.sequences.shape
    assert rounded.past_key_values.get_seq_length() == exact.past_key_values.get_seq_length()
    torch.testing.assert_close(rounded.logits[0], exact.logits[0], **TOLERANCE)
    same = rounded.sequences[:, -NEW_TOKENS] == exact.sequences[:, -NEW_TOKENS]
    assert same.all()
    error = (rounded.logits[1] - exact.logits[1]).abs().mean()
    assert 1e-4 < error < 0.5 * exact.logits[1].std()


def test_without_a_cache(model, inputs, expected):
    assert new_tokens(model, inputs, use_cache=False) == expected
    assert new_tokens(model, with_cache(model, inputs), use_cache=False) == expected


# Prefill


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5])
def test_chunked_prefill(model, inputs, expected, chunk_size):
    """Chunks cut through the VoCo tokens of an image, at other places in every row."""
    assert_greedy(model, inputs, single_rows(inputs), prefill_chunk_size=chunk_size)
    assert new_tokens(model, with_cache(model, inputs), prefill_chunk_size=chunk_size) == expected
    static = {"prefill_chunk_size": chunk_size, "cache_implementation": "static"}
    assert new_tokens(model, inputs, **static) == expected


def as_embeds(model, inputs: dict) -> dict:
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    return {name: value for name, value in inputs.items() if name != "input_ids"} | {"inputs_embeds": embeds}


def test_inputs_embeds(model, inputs, expected):
    assert new_tokens(model, as_embeds(model, inputs)) == expected
    assert new_tokens(model, as_embeds(model, with_cache(model, inputs))) == expected
    assert new_tokens(model, as_embeds(model, inputs), cache_implementation="static") == expected


def test_compressed_images_of_the_caller(model, inputs, expected):
    """What `get_compressed_images` returned may be passed to several calls, of `forward` as well."""
    voco_mask = (inputs["input_ids"] == VOCO).cpu().numpy()
    with torch.no_grad():
        images = model.get_compressed_images(inputs["pixel_values"], None, inputs["num_voco_tokens"], voco_mask)
        rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        for _ in range(2):
            assert new_tokens(model, rest, compressed_images=images) == expected
        assert new_tokens(model, rest, compressed_images=images, num_beams=2) == new_tokens(model, inputs, num_beams=2)
        logits = model(**rest, compressed_images=images).logits[:, -1]
        torch.testing.assert_close(logits, model(**inputs, use_cache=True).logits[:, -1], **TOLERANCE)


# What comes back


class Collect(BaseStreamer):
    def __init__(self):
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer_gets_the_prompt_and_every_token(model, inputs, expected):
    for row, answer in zip(single_rows(inputs), expected):
        streamer = Collect()
        new_tokens(model, row, streamer=streamer)
        assert streamer.parts == [row["input_ids"][0].tolist(), *[[token] for token in answer]]
        assert streamer.ended


@pytest.mark.parametrize("prepare", [lambda model, inputs: inputs, with_cache], ids=["pixels", "cache"])
def test_return_dict_in_generate(model, inputs, expected, prepare):
    length = inputs["input_ids"].shape[1]
    outputs = model.generate(
        **prepare(model, inputs),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert outputs.sequences[:, length:].tolist() == expected
    assert len(outputs.scores) == len(outputs.logits) == len(outputs.hidden_states) == NEW_TOKENS
    assert all(torch.equal(score, logits) for score, logits in zip(outputs.scores, outputs.logits))
    assert_follows(model, outputs, single_rows(inputs))
    # Layers of the prefill, then of each new token
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != VOCO)
    with torch.no_grad():
        reference = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    assert len(outputs.hidden_states[0]) == len(reference) == 4
    for states, single in zip(outputs.hidden_states[0], reference):
        torch.testing.assert_close(states[text], single[text], **TOLERANCE)
    for step in outputs.hidden_states[1:]:
        assert [states.shape for states in step] == [(len(LAYOUTS), 1, 64)] * 4


def test_last_hidden_states_of_both_ways(model, inputs):
    """Also at VoCo tokens, and also where they come back among all hidden states."""
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        single = model.model(**inputs, use_cache=False, output_hidden_states=True)
        stages = model.model(**inputs, use_cache=True, output_hidden_states=True)
    torch.testing.assert_close(stages.last_hidden_state[tokens], single.last_hidden_state[tokens], **TOLERANCE)
    torch.testing.assert_close(single.hidden_states[-1], single.last_hidden_state)
    torch.testing.assert_close(stages.hidden_states[-1], stages.last_hidden_state)


def test_classifier_free_guidance(model, inputs):
    """Without a negative prompt, the answer alone is scored behind the last token of the prompt."""
    row = single_rows(inputs)[1]
    without = {"input_ids": row["input_ids"][:, -1:]}
    ids: list[int] = []
    for _ in range(NEW_TOKENS):
        guided = single_pass(model, row, ids)[-1].log_softmax(-1)
        free = single_pass(model, without, ids)[-1].log_softmax(-1)
        ids.append(int((free + 1.8 * (guided - free)).argmax()))
    assert new_tokens(model, row, guidance_scale=1.8) == [ids]
    assert new_tokens(model, with_cache(model, row), guidance_scale=1.8) == [ids]


# Later turns

TURNS = {
    # The second turn of each row; all rows are equally long
    "text": [["text:6"], ["text:6"], ["text:6"]],
    "images": [["text:2", "image:3", "text:1"], ["image:1", "text:3", "image:1", "text:1"], ["text:6"]],
}


class Conversation:
    """A first turn that was answered, and a second one."""

    def __init__(self, model, second: str, padded: bool, **kwargs):
        first = [
            ["text:2", "image:2", "text:3"],
            ["image:1", "text:1", "image:2", "text:1" if padded else "text:3"],
            ["text:4" if padded else "text:7"],
        ]
        self.model = model
        inputs = random_inputs(model, first)
        arguments = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True}
        answered = model.generate(**inputs, **arguments, **kwargs)
        self.past_key_values = answered.past_key_values
        rows, self.new_counts = random_rows(TURNS[second], seed=1)
        self.ids = torch.cat([answered.sequences, torch.tensor(rows)], dim=1)
        self.mask = torch.cat([inputs["attention_mask"], torch.ones(3, 4 + 6, dtype=torch.long)], dim=1)
        assert padded == bool((self.mask == 0).any())
        old, self.new_pixels = inputs["pixel_values"], random_pixels(model, len(self.new_counts), seed=1)
        self.all_pixels, self.all_counts = old, [2, 1, 2]
        if second == "images":
            # Row by row: the images of the first turn, then those of the second
            self.all_pixels = torch.cat([old[:1], self.new_pixels[:1], old[1:], self.new_pixels[1:]])
            self.all_counts = [2, 3, 1, 2, 1, 1]

    def from_scratch(self) -> list[dict]:
        whole = {"input_ids": self.ids, "attention_mask": self.mask, "pixel_values": self.all_pixels}
        return single_rows({**whole, "num_voco_tokens": torch.tensor(self.all_counts)})

    def text(self, ids: str) -> dict:
        """The whole conversation, or only what the cache does not hold yet and a longer mask."""
        past_key_values = copy.deepcopy(self.past_key_values)
        seen = 0 if ids == "all ids" else past_key_values.get_seq_length()
        return {"input_ids": self.ids[:, seen:], "attention_mask": self.mask, "past_key_values": past_key_values}

    def images(self, images: str) -> dict:
        if images == "no images":
            return {}
        which, form = images.split()
        new = which == "new"
        pixels, counts = (self.new_pixels, self.new_counts) if new else (self.all_pixels, self.all_counts)
        if form == "pixels":
            return {"pixel_values": pixels, "num_voco_tokens": torch.tensor(counts)}
        return {"voco_cache": self.model.compress(pixels, counts)}


@pytest.fixture(scope="module", params=[True, False], ids=["padded", "equal"])
def conversations(model, request):
    """Rows of different lengths, and rows of one length, whose mask `generate` drops."""
    return {second: Conversation(model, second, padded=request.param) for second in TURNS}


@pytest.mark.parametrize(
    "ids, images",
    [("all ids", "no images"), ("all ids", "all pixels"), ("all ids", "all cache"), ("new ids", "no images")],
)
def test_second_turn_of_text(model, conversations, ids, images):
    turn = conversations["text"]
    assert_greedy(model, turn.text(ids) | turn.images(images), turn.from_scratch())


@pytest.mark.parametrize(
    "ids, images",
    [
        ("all ids", "new pixels"),
        ("all ids", "new cache"),
        ("all ids", "all pixels"),
        ("all ids", "all cache"),
        ("new ids", "new pixels"),
        ("new ids", "new cache"),
    ],
)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_second_turn_with_images(model, conversations, ids, images, chunk_size):
    turn = conversations["images"]
    inputs = turn.text(ids) | turn.images(images)
    assert_greedy(model, inputs, turn.from_scratch(), prefill_chunk_size=chunk_size)


def test_images_of_earlier_turns_need_their_tokens(model, conversations):
    """With the new ids alone there is no telling where the earlier images stood."""
    turn = conversations["images"]
    for images in ("all pixels", "all cache"):
        with pytest.raises(ValueError, match=r"6 images.* 10 <voco> tokens.* 5"):
            model.generate(**turn.text("new ids"), **turn.images(images), max_new_tokens=2)


def test_second_turn_encodes_new_images_only(model, conversations):
    turn = conversations["images"]
    for images in ("new pixels", "all pixels"):
        inputs = turn.text("all ids") | turn.images(images)
        assert encoded_images(model, lambda inputs=inputs: new_tokens(model, inputs)) == 3
    turn = conversations["text"]
    inputs = turn.text("all ids") | turn.images("all pixels")
    assert encoded_images(model, lambda: new_tokens(model, inputs)) == 0


@pytest.mark.parametrize("ids", ["all ids", "new ids"])
@pytest.mark.parametrize("count", [1, 2])
def test_second_turn_without_num_voco_tokens(model, ids, count):
    """Also when the number is not the default of the config."""
    turn = plain_conversation(model, count)
    seen = 0 if ids == "all ids" else turn["past_key_values"].get_seq_length()
    second = {
        "input_ids": turn["input_ids"][:, seen:],
        "attention_mask": torch.ones_like(turn["input_ids"]),
        "past_key_values": turn["past_key_values"],
        "pixel_values": turn["pixel_values"][1:],
    }
    assert_greedy(model, second, [scratch_of(turn)])


def test_all_images_without_num_voco_tokens_are_right_or_refused(model):
    """Two images for four tokens of which two are new: both images again, or two new ones of one token each."""
    turn = plain_conversation(model, 2)
    second = {name: turn[name] for name in ("input_ids", "pixel_values", "past_key_values")}
    try:
        model.generate(**{**second, "past_key_values": copy.deepcopy(second["past_key_values"])}, max_new_tokens=2)
    except ValueError:
        return
    assert_greedy(model, second, [scratch_of(turn)])


def plain_conversation(model, count: int) -> dict:
    """One row without padding, one image of `count` tokens in each of two turns; `num_voco_tokens` are all of them."""
    inputs = random_inputs(model, [["text:2", f"image:{count}", "text:3"]])
    first = model.generate(**inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    second, _ = random_rows([["text:1", f"image:{count}", "text:2"]], seed=1)
    return {
        "input_ids": torch.cat([first.sequences, torch.tensor(second)], dim=1),
        "pixel_values": torch.cat([inputs["pixel_values"], random_pixels(model, 1, seed=1)]),
        "num_voco_tokens": torch.tensor([count, count]),
        "past_key_values": first.past_key_values,
    }


def scratch_of(turn: dict) -> dict:
    return {name: value for name, value in turn.items() if name != "past_key_values"}


@pytest.mark.parametrize(
    "as_ids, images",
    [
        ("ids", "no images"),
        ("ids", "new pixels"),
        ("ids", "new cache"),
        ("ids", "all pixels"),
        ("embeddings", "new pixels"),
    ],
)
def test_second_turn_of_several_sequences_a_row(model, conversations, as_ids, images):
    """The cache of the first turn is repeated by the caller, as `generate` leaves caches as they are."""
    turn = conversations["text" if images == "no images" else "images"]
    inputs = turn.text("all ids") | turn.images(images)
    if as_ids == "embeddings":
        inputs = as_embeds(model, inputs)
    inputs["past_key_values"].batch_repeat_interleave(3)
    arguments = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    set_seed(5)
    outputs = model.generate(**inputs, **arguments, do_sample=True, num_return_sequences=3, suppress_tokens=[VOCO])
    assert_follows(model, outputs, [row for row in turn.from_scratch() for _ in range(3)])


def test_second_turn_with_beams(model, conversations):
    turn = conversations["images"]
    inputs = turn.text("all ids") | turn.images("new pixels")
    inputs["past_key_values"].batch_repeat_interleave(3)
    arguments = {"return_dict_in_generate": True, "output_scores": True}
    outputs = model.generate(**inputs, **arguments, do_sample=False, num_beams=3, max_new_tokens=3)
    best = [beam_reference(model, row, 3, 3)[0] for row in turn.from_scratch()]
    assert outputs.sequences[:, -3:].tolist() == [ids for _, ids in best]
    torch.testing.assert_close(outputs.sequences_scores, torch.tensor([score for score, _ in best]), **TOLERANCE)


def test_second_turn_in_a_static_cache(model):
    cache = StaticCache(config=model.config.text_config, max_cache_len=48)
    turn = Conversation(model, "images", padded=True, past_key_values=cache)
    inputs = {"input_ids": turn.ids, "attention_mask": turn.mask, "past_key_values": cache}
    assert_greedy(model, inputs | turn.images("new pixels"), turn.from_scratch())


def test_second_turn_of_embeddings(model, conversations):
    """`generate` takes the embeddings of the whole conversation."""
    turn = conversations["images"]
    for images in ("new pixels", "all pixels", "new cache"):
        assert_greedy(model, as_embeds(model, turn.text("all ids")) | turn.images(images), turn.from_scratch())


def test_three_turns(model):
    """Each turn brings an image and continues from the cache of the turn before."""
    counts = [2, 1, 3]
    pixels = random_pixels(model, 3)
    ids, past = torch.empty(1, 0, dtype=torch.long), None
    for turn, count in enumerate(counts):
        rows, _ = random_rows([["text:2", f"image:{count}", "text:2"]], seed=turn)
        ids = torch.cat([ids, torch.tensor(rows)], dim=1)
        images = {"pixel_values": pixels[turn : turn + 1], "num_voco_tokens": count}
        arguments = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
        outputs = model.generate(ids, **images, past_key_values=past, **arguments)
        scratch = {"input_ids": ids, "pixel_values": pixels[: turn + 1]}
        assert_follows(model, outputs, [{**scratch, "num_voco_tokens": torch.tensor(counts[: turn + 1])}])
        ids, past = outputs.sequences, outputs.past_key_values


def test_forward_continues_a_cache(model):
    """A decoding loop of one's own: the prompt in two parts, each with its images."""
    row = random_inputs(model, [["text:2", "image:2", "text:3", "image:1", "text:3"]])
    with torch.no_grad():
        whole = model(**row, use_cache=False).logits
        first = model(row["input_ids"][:, :6], row["pixel_values"][:1], num_voco_tokens=2, use_cache=True)
        second = model(
            row["input_ids"][:, 6:],
            row["pixel_values"][1:],
            num_voco_tokens=1,
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, **TOLERANCE)


# Cached images


def test_generate_from_a_cache_equals_pixels(model, inputs, expected):
    cached = with_cache(model, inputs)
    assert new_tokens(model, cached) == expected
    # The cache knows how many tokens its images have
    cached.pop("num_voco_tokens")
    assert new_tokens(model, cached) == expected


def test_cached_images_alone_reordered_and_next_to_others(model, inputs, expected):
    cache = model.compress(inputs["pixel_values"], inputs["num_voco_tokens"])
    rows = [row["input_ids"][0].tolist() for row in single_rows(inputs)]
    images = [[0], [1, 2], [], [3, 4]]
    for order in ([0], [3], [1, 0], [3, 2, 0, 1], [0, 0, 3, 0], [2, 1, 1]):
        picked = cache[[image for r in order for image in images[r]]]
        batch = {**pad_rows([rows[r] for r in order]), "voco_cache": picked}
        assert new_tokens(model, batch) == [expected[r] for r in order]


def test_images_compressed_one_by_one(model, inputs, expected):
    """Compressed in batches of one, in batches of two, and each in a call of its own."""
    pixels, counts = inputs["pixel_values"], inputs["num_voco_tokens"]
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    single = [model.compress(pixels[i : i + 1], int(counts[i])) for i in range(len(pixels))]
    caches = [
        model.compress(pixels, counts, batch_size=1, show_progress=False),
        model.compress(pixels, counts, batch_size=2, show_progress=False),
        VoCoCache.cat(single),
        VoCoCache.cat(single[::-1])[::-1],
    ]
    for cache in caches:
        assert new_tokens(model, rest, voco_cache=cache) == expected


def test_one_cached_image_is_asked_many_questions(model):
    pixels = random_pixels(model, 2)
    cache = model.compress(pixels, [3, 2])
    questions, _ = random_rows([["text:2"], ["text:5"], ["text:1"], ["text:3"]], seed=4)
    for image, count in ((0, 3), (1, 2)):
        rows = [[VOCO] * count + question for question in questions]
        scratch = {"pixel_values": pixels[image : image + 1], "num_voco_tokens": count}
        assert_greedy(
            model,
            {**pad_rows(rows), "voco_cache": cache[[image] * len(rows)]},
            [{"input_ids": torch.tensor([row]), **scratch} for row in rows],
        )


def test_one_image_twice_in_a_row(model):
    """The same entry at two places of one sequence."""
    pixels = random_pixels(model, 1)
    cache = model.compress(pixels, 2)
    rows, counts = random_rows([["text:3", "image:2", "text:2", "image:2", "text:3"]])
    scratch = {"input_ids": torch.tensor(rows), "pixel_values": pixels.repeat(2, 1, 1, 1)}
    scratch["num_voco_tokens"] = torch.tensor(counts)
    assert_greedy(model, {**pad_rows(rows), "voco_cache": cache[[0, 0]]}, [scratch])


# Errors


def test_counts_that_do_not_fit_are_named(model):
    inputs = random_inputs(model, [["image:2", "text:2"], ["text:1", "image:2", "text:3"]])
    counts = inputs.pop("num_voco_tokens")
    with pytest.raises(ValueError, match=r"need 6 <voco> tokens.* 4"):
        model.generate(**inputs, num_voco_tokens=3)
    with pytest.raises(ValueError, match=r"need 3 <voco> tokens.* 4"):
        model.generate(**inputs, num_voco_tokens=[1, 2])
    with pytest.raises(ValueError, match=r"3 numbers.* 2 images"):
        model.generate(**inputs, num_voco_tokens=[1, 2, 1])
    with pytest.raises(ValueError, match=r"4 <voco> tokens for 3 images"):
        model.generate(**{**inputs, "pixel_values": random_pixels(model, 3)})
    with pytest.raises(ValueError, match=r"torn apart"):
        model.generate(**inputs, num_voco_tokens=[1, 3])
    cache = model.compress(inputs["pixel_values"], counts)
    with pytest.raises(ValueError, match=r"2 .*4"):
        model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], voco_cache=cache[0])
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        model.generate(inputs["input_ids"], voco_cache=cache, num_voco_tokens=[1, 3])


def test_pixels_without_tokens(model):
    text = random_inputs(model, [["text:4"]])
    with pytest.raises(ValueError, match=r"0 <voco> tokens for 1 images"):
        model.generate(**text, pixel_values=random_pixels(model, 1))


def test_tokens_without_images(model, inputs, conversations):
    with pytest.raises(ValueError, match=r"9 <voco> tokens"):
        model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    embeds = as_embeds(model, inputs)
    with pytest.raises(ValueError, match=r"9 <voco> tokens"):
        model.generate(inputs_embeds=embeds["inputs_embeds"], attention_mask=embeds["attention_mask"])


@pytest.mark.parametrize("ids", ["all ids", "new ids"])
def test_tokens_without_images_in_a_later_turn(model, conversations, ids):
    with pytest.raises(ValueError, match=r"5 <voco> tokens"):
        model.generate(**conversations["images"].text(ids), max_new_tokens=2)


def test_images_given_twice(model, inputs):
    cache = with_cache(model, inputs)["voco_cache"]
    with pytest.raises(ValueError, match="not both"):
        model.generate(**inputs, voco_cache=cache)


def test_cache_of_another_model(model, inputs):
    other = tiny_model(seed=1)
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask", "num_voco_tokens")}
    with pytest.raises(ValueError, match=r"another model.*weights"):
        model.generate(**rest, voco_cache=other.compress(inputs["pixel_values"], inputs["num_voco_tokens"]))
    smaller = tiny_model(text={"num_hidden_layers": 2})
    with pytest.raises(ValueError, match=r"another model.*layers is 2, not 3"):
        model.generate(**rest, voco_cache=smaller.compress(inputs["pixel_values"], inputs["num_voco_tokens"]))


@pytest.mark.parametrize("mode", ["causal", "uncompressed"])
def test_other_attention_modes_do_not_generate(model, inputs, mode):
    with pytest.raises(ValueError, match=f'"{mode}".*LlavaForConditionalGeneration'):
        model.generate(**inputs, attention_mode=mode)
    configured = tiny_model(attention_mode=mode)
    with pytest.raises(ValueError, match=f'"{mode}".*LlavaForConditionalGeneration'):
        configured.generate(**inputs)


@pytest.mark.parametrize("mode", ["causal", "uncompressed"])
def test_attention_mode_of_a_call_overrides_the_config(inputs, expected, mode):
    configured = tiny_model(attention_mode=mode)
    assert new_tokens(configured, inputs, attention_mode="voco") == expected


def test_prompt_that_ends_with_a_cached_image(model):
    inputs = random_inputs(model, [["text:3", "image:2"], ["text:2", "image:1", "text:2"]])
    rows = single_rows(inputs)
    assert_greedy(model, inputs, rows)
    with pytest.raises(ValueError, match="must end with text"):
        model.generate(**with_cache(model, inputs))


# Text models and vision towers


def rope(**parameters) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
HYBRID = ["sliding_attention", "full_attention", "full_attention"]

ARCHITECTURES = {
    "llama": {"text_class": LlamaConfig},
    "llama3 rope": {"text": rope(rope_type="llama3", **LLAMA3)},
    "yarn rope": {"text": rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=64)},
    "linear rope": {"text": rope(rope_type="linear", factor=4.0)},
    "mistral": {"text_class": MistralConfig},
    "mistral, no window": {"text_class": MistralConfig, "text": {"sliding_window": None}},
    "mistral, small window": {"text_class": MistralConfig, "text": {"sliding_window": 6}},
    "qwen2": {"text_class": Qwen2Config},
    "qwen2, some layers with a window": {
        "text_class": Qwen2Config,
        "text": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    },
    "qwen3": {"text_class": Qwen3Config},
    "gemma2": {"text_class": Gemma2Config, "text": {"sliding_window": 5, "layer_types": HYBRID}},
    "cohere, interleaved rope": {"text_class": CohereConfig},
    "phi3, partial rope": {"text_class": Phi3Config, "text": {"partial_rotary_factor": 0.5}},
    "siglip": {"vision_class": SiglipVisionConfig, "vision_feature_select_strategy": "full"},
    "two vision layers": {"vision_feature_layer": [-2, -1]},
    "nine vision tokens": {"vision": {"image_size": 42}},
    "longer prefix and suffix": {"vision_prefix_token_ids": [1, 40, 41], "vision_suffix_token_ids": [13, 42]},
    "no prefix, no suffix": {"vision_prefix_token_ids": [], "vision_suffix_token_ids": []},
}


def assert_both_ways_agree(model):
    inputs = random_inputs(model, [["text:3", "image:2", "text:8"], ["image:1", "text:2", "image:3", "text:2"]])
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        single, stages = model(**inputs, use_cache=False).logits, model(**inputs, use_cache=True).logits
    torch.testing.assert_close(stages[tokens], single[tokens], **TOLERANCE)
    rows = single_rows(inputs)
    assert_greedy(model, inputs, rows, 4)
    assert_greedy(model, with_cache(model, inputs), rows, 4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_text_models_and_vision_towers(name):
    assert_both_ways_agree(tiny_model(**ARCHITECTURES[name]))


@pytest.mark.parametrize("name", ["mistral, small window", "qwen2, some layers with a window", "gemma2"])
@pytest.mark.parametrize(
    "arguments", [{"cache_implementation": "static"}, {"prefill_chunk_size": 2}, {"num_beams": 2}]
)
def test_sliding_windows_in_other_modes(name, arguments):
    model = tiny_model(**ARCHITECTURES[name])
    inputs = random_inputs(model, [["text:3", "image:2", "text:8"], ["image:1", "text:2", "image:3", "text:2"]])
    rows = single_rows(inputs)
    if "num_beams" in arguments:
        best = [beam_reference(model, row, 2, 4)[0][1] for row in rows]
        assert new_tokens(model, inputs, max_new_tokens=4, **arguments) == best
    else:
        assert_greedy(model, inputs, rows, **arguments)


@pytest.mark.parametrize("name", ["mistral, small window", "gemma2"])
def test_sliding_windows_in_a_second_turn(name):
    """The cache of a sliding layer holds its window only."""
    model = tiny_model(**ARCHITECTURES[name])
    turn = Conversation(model, "images", padded=True)
    for images in ("new pixels", "all cache"):
        assert_greedy(model, turn.text("all ids") | turn.images(images), turn.from_scratch())


@pytest.mark.parametrize(
    "text_class, text",
    [
        (SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
        (Cohere2Config, {"sliding_window": 5, "layer_types": HYBRID}),
        (Exaone4Config, {"sliding_window": 5, "layer_types": HYBRID}),
        (PhiConfig, {"partial_rotary_factor": 0.5}),
    ],
    ids=["smollm3", "cohere2", "exaone4", "phi"],
)
def test_text_models_that_rotate_in_their_own_way_are_right_or_refused(text_class, text):
    """Layers without rotation, or a rotation of a part of the head outside `apply_rotary_pos_emb`."""
    try:
        model = tiny_model(text_class=text_class, text=text)
        model.compress(random_pixels(model, 1))
    except ValueError as error:
        assert text_class.model_type in str(error)
        return
    assert_both_ways_agree(model)


def test_layers_without_rope_are_found_before_voco_is_trained():
    """A token that was added to the vocabulary may start with zeros, which look the same at every position."""
    model = tiny_model(text_class=SmolLM3Config, text={"no_rope_layers": [1, 0, 1]})
    model.get_input_embeddings().weight.data[VOCO] = 0
    with pytest.raises(ValueError, match="smollm3"):
        model.compress(random_pixels(model, 1))


def test_length_dependent_rope_is_refused():
    with pytest.raises(ValueError, match="dynamic"):
        tiny_model(text=rope(rope_type="dynamic", factor=4.0))
