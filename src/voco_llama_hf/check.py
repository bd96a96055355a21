"""Whether a model computes right with what is installed here: ways of computing that must agree, compared."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, MistralConfig
from transformers.generation import GenerateDecoderOnlyOutput

from .modeling import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration
from .modeling.compat_voco_llama import CACHE


NEW_TOKENS = 4
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
COARSE_TOLERANCE = 0.15  # of data types with few digits


@dataclass
class Check:
    """
    One way of computing beside the reference, a single pass over the long sequence with eager attention.

    Args:
        name (`str`): What was compared.
        error (`float`): Largest difference of logits, in standard deviations of the reference's logits.
        tolerance (`float`): What rounding explains.
        problem (`str`, *optional*): The error that was raised instead.
    """

    name: str
    error: float
    tolerance: float
    problem: str | None = None

    @property
    def agrees(self) -> bool:
        return self.problem is None and self.error <= self.tolerance


class Prompt:
    """Random text and images for a model: rows of token ids, and the images and their VoCo tokens in order."""

    def __init__(self, model: VoCoLlamaForConditionalGeneration, layout: list[list[int]], seed: int):
        """`layout` has the parts of each row: n text tokens, or an image of -n VoCo tokens."""
        generator = torch.Generator().manual_seed(seed)
        config = model.config
        size, vocabulary = config.vision_config.image_size, config.text_config.vocab_size
        rows = []
        self.counts = [-part for row in layout for part in row if part < 0]
        for row in layout:
            ids = []
            for part in row:
                text = torch.randint(vocabulary - 1, (abs(part),), generator=generator)
                text += text >= config.voco_token_id  # any token but <voco>
                ids.append(text if part > 0 else torch.full_like(text, config.voco_token_id))
            rows.append(torch.cat(ids))
        self.input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        padding = [torch.ones(len(row), dtype=torch.long) for row in rows]
        self.attention_mask = torch.nn.utils.rnn.pad_sequence(padding, batch_first=True, padding_side="left")
        self.pixel_values = torch.randn(len(self.counts), 3, size, size, generator=generator)

    def inputs(self, model: VoCoLlamaForConditionalGeneration) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.input_ids.to(model.device),
            "attention_mask": self.attention_mask.to(model.device),
            "pixel_values": self.pixel_values.to(model.device, model.dtype),
            "num_voco_tokens": torch.tensor(self.counts),
        }


LAYOUT = [[3, -2, 4], [-1, 2, -2, 3], [5]]


def run_checks(model: VoCoLlamaForConditionalGeneration) -> Iterator[Check]:
    """
    Compares, one after the other, what a model answers in all its ways; the model's attention is used in each.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): The model, on its device, in eval mode.

    Returns:
        `Iterator` of [`Check`].
    """
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    prompt = Prompt(model, LAYOUT, seed=0)
    windowed = build_windowed_model().eval()
    windowed.to(model.device, model.dtype)
    windowed_reference = copy.deepcopy(windowed)
    windowed_reference.set_attn_implementation("eager")
    windowed.set_attn_implementation(model.config.text_config._attn_implementation)
    long = Prompt(windowed, [[4, -2, 9], [-1, 12]], seed=1)
    yield _check("single pass and two stages", model, lambda: _stages_error(model, reference, prompt))
    yield _check("answers", model, lambda: _answer_error(model, reference, prompt))
    yield _check("chunked prefill", model, lambda: _answer_error(model, reference, prompt, prefill_chunk_size=2))
    yield _check("static cache", model, lambda: _answer_error(model, reference, prompt, cache_implementation="static"))
    yield _check("second turn with images", model, lambda: _second_turn_error(model, reference))
    yield _check("sliding window", windowed, lambda: _answer_error(windowed, windowed_reference, long))


def build_windowed_model() -> VoCoLlamaForConditionalGeneration:
    """A tiny random model with a sliding window, whose answers differ clearly between inputs."""
    text = MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        max_position_embeddings=512,
        sliding_window=6,
        pad_token_id=0,
        eos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = VoCoLlamaConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        voco_token_id=127,
        vision_feature_layer=-2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VoCoLlamaForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(1 if parameter.ndim == 1 else 0, 0.15)
    return model


def _check(name: str, model: VoCoLlamaForConditionalGeneration, measure: Callable[[], float]) -> Check:
    tolerance = TOLERANCES.get(model.dtype, COARSE_TOLERANCE)
    try:
        return Check(name, measure(), tolerance)
    except Exception as error:  # whatever does not run here is what is to be found out
        return Check(name, float("nan"), tolerance, f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits.float() - expected.float()).abs().max() / expected.float().std())


@torch.no_grad()
def _stages_error(
    model: VoCoLlamaForConditionalGeneration, reference: VoCoLlamaForConditionalGeneration, prompt: Prompt
) -> float:
    inputs = prompt.inputs(model)
    tokens = inputs["attention_mask"].bool()
    expected = reference(**inputs, use_cache=False).logits[tokens]
    return _distance(model(**inputs, use_cache=True).logits[tokens], expected)


def _answer_error(
    model: VoCoLlamaForConditionalGeneration, reference: VoCoLlamaForConditionalGeneration, prompt: Prompt, **arguments
) -> float:
    outputs = _answer(model, **prompt.inputs(model), **arguments)
    return _follow(reference, outputs, prompt.inputs(model))


def _second_turn_error(
    model: VoCoLlamaForConditionalGeneration, reference: VoCoLlamaForConditionalGeneration
) -> float:
    first = Prompt(model, [[3, -2, 4]], seed=2)
    second = Prompt(model, [[2, -1, 3]], seed=3)
    answered = _answer(model, **first.inputs(model))
    input_ids = torch.cat([answered.sequences, second.input_ids.to(model.device)], dim=1)
    both = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.cat([first.pixel_values, second.pixel_values]).to(model.device, model.dtype),
        "num_voco_tokens": torch.tensor([*first.counts, *second.counts]),
    }
    outputs = _answer(model, **both, **{CACHE: answered[CACHE]})
    return _follow(reference, outputs, both)


def _answer(model: VoCoLlamaForConditionalGeneration, **inputs) -> GenerateDecoderOnlyOutput:
    return model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        suppress_tokens=[model.config.voco_token_id],
        output_logits=True,
        return_dict_in_generate=True,
    )


@torch.no_grad()
def _follow(
    reference: VoCoLlamaForConditionalGeneration, outputs: GenerateDecoderOnlyOutput, inputs: dict[str, torch.Tensor]
) -> float:
    """How far the logits of an answer are from those of the reference, given the same answer."""
    length = inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, outputs.sequences.shape[1] - length), value=1)
    whole = {**inputs, "input_ids": outputs.sequences, "attention_mask": mask}
    expected = reference(**whole, use_cache=False).logits[:, length - 1 : -1]
    return _distance(torch.stack(outputs.logits, dim=1), expected)  # type: ignore[arg-type]


__all__ = ["Check", "run_checks"]
