"""How the tokens of answers are drawn: every row of a batch by what its own request asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


MIN_TEMPERATURE = 0.01  # below it logits overflow, and the likeliest token is drawn anyway


@dataclass(frozen=True)
class Sampling:
    """
    Args:
        temperature (`float`): What logits are divided by; 0 takes the likeliest token.
        top_p (`float`): Probability of the likeliest tokens to draw from, together.
        top_k (`int`): How many of the likeliest tokens to draw from; 0 is all.
        frequency_penalty (`float`): Taken off the logit of a token for each time that the answer has it.
        presence_penalty (`float`): Taken off the logit of each token that the answer has.
        seed (`int`, *optional*): What the drawing starts from; the same seed gives the same answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None

    @classmethod
    def of_request(cls, body: dict[str, Any], default: GenerationConfig) -> "Sampling":
        """What a checked request asks for; where it is silent, the model's own configuration has it."""
        own: dict[str, float] = {}
        if default.do_sample:
            own = {"temperature": default.temperature or 1.0, "top_p": default.top_p or 1.0}
        # JSON has 1 for 1.0, which the classes of transformers do not take
        numbers = own | {name: float(body[name]) for name in NUMBERS if body.get(name) is not None}
        if numbers.get("temperature", 0.0) < MIN_TEMPERATURE:
            numbers["temperature"] = 0.0
        top_k = default.top_k or 0 if default.do_sample else 0
        return cls(**numbers, top_k=top_k, seed=body.get("seed"))


NUMBERS = ("temperature", "top_p", "frequency_penalty", "presence_penalty")


class Drawing(LogitsProcessor):
    """
    Draws in place of `generate`, which knows one configuration for all rows and one state of chance for all threads:
    what it returns is largest at the token that was drawn.

    Args:
        samplings (`Sequence[Sampling]`): One a row.
        prompt_length (`int`): Columns before the answers.
        device (`torch.device`): Where the scores are.
    """

    def __init__(self, samplings: Sequence[Sampling], prompt_length: int, device: torch.device):
        self.samplings = samplings
        self.prompt_length = prompt_length
        self.generators = [torch.Generator(device) for _ in samplings]
        for generator, sampling in zip(self.generators, samplings):
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        drawn = [
            self._draw(sampling, generator, input_ids[row : row + 1], scores[row : row + 1])
            for row, (sampling, generator) in enumerate(zip(self.samplings, self.generators))
        ]
        return torch.cat(drawn)  # type: ignore[return-value]

    def _draw(self, sampling: Sampling, generator: torch.Generator, ids: Any, scores: Any) -> torch.Tensor:
        if sampling.frequency_penalty or sampling.presence_penalty:
            counts = torch.bincount(ids[0, self.prompt_length :], minlength=scores.shape[1]).to(scores.dtype)
            scores = scores - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
        if not sampling.temperature:
            return scores
        scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
        if sampling.top_k:
            scores = TopKLogitsWarper(min(sampling.top_k, scores.shape[1]))(ids, scores)
        if sampling.top_p < 1:
            scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
        # The largest of probabilities over exponential noise is a draw from them
        probabilities = scores.float().softmax(-1)
        return probabilities / torch.empty_like(probabilities).exponential_(generator=generator)


__all__ = ["Drawing", "Sampling"]
