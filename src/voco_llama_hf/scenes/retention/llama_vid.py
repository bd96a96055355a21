"""LLaMA-VID beside VoCo: each question makes tokens of its own of every frame, so it is a sequence of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...llava import as_llava
from ...modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..data import PhaseRow
from ..readers import MAX_ANSWER_TOKENS, Reader, VideoReader, decode_answers, make_prompts
from ..single_questions import IGNORED, pairs, tokenize_turn


NO_FRAME = -1


class LlamaVid(torch.nn.Module):
    """
    A model behind whose vision tower [`TwoTokens`] stand, asked as they need it.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): Model with the compressor `"llama-vid"`; trained in place.
    """

    def __init__(self, model: VoCoLlamaForConditionalGeneration):
        super().__init__()
        self.model = model

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()

    def embed(
        self,
        vision: torch.Tensor,
        frames: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        question_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            vision (`torch.Tensor` of shape `(num_images, V, hidden_size)`): Projected vision tokens.
            frames (`torch.LongTensor` of shape `(num_questions, num_frames)`):
                Images of each question, in time order; padded with -1 on the left.
            input_ids, attention_mask (`torch.LongTensor` of shape `(num_questions, length)`):
                Question, and answer if it is known; padded on the right or on the left.
            question_mask (`torch.LongTensor` of shape `(num_questions, length)`): Which tokens are the question's.

        Returns:
            Embeddings `(num_questions, prefix + 2 * num_frames + length, hidden_size)` and their attention mask.
        """
        text = self.model.get_input_embeddings()(input_ids)
        tokens = self.model.model.multi_modal_projector.reduce(vision[frames.clamp(min=0)], text, question_mask)
        prefix_ids = torch.tensor(self.model.config.vision_prefix_token_ids, device=input_ids.device)
        prefix = self.model.get_input_embeddings()(prefix_ids).expand(len(frames), -1, -1)
        seen = (frames != NO_FRAME).long().repeat_interleave(2, dim=1)
        ones = seen.new_ones(len(frames), len(prefix_ids))
        embeddings = torch.cat([prefix, tokens.flatten(1, 2).to(text.dtype), text], dim=1)
        return embeddings, torch.cat([ones, seen, attention_mask], dim=1)

    def forward(
        self,
        pixel_values: torch.Tensor,
        frames: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        question_mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> CausalLMOutputWithPast:
        """The arguments of [`embed`], `pixel_values` of all images, and `labels` of the text."""
        vision = self.model.model.get_vision_features(pixel_values)
        embeddings, mask = self.embed(vision, frames, input_ids, attention_mask, question_mask)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        decoder = self.model.model.language_model
        states = decoder(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False)
        logits = self.model.lm_head(states.last_hidden_state[:, -input_ids.shape[1] - 1 : -1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return CausalLMOutputWithPast(loss=loss, logits=logits.argmax(-1))


class LlamaVidCollator:
    """
    Makes batches for [`LlamaVid`] out of conversations about an image or a video each: every turn is a sequence.

    Args:
        processor ([`VoCoLlamaProcessor`]): Processor of the model.
    """

    def __init__(self, processor: VoCoLlamaProcessor):
        self.processor = processor

    def __call__(self, examples: list[PhaseRow]) -> dict[str, torch.Tensor]:
        shown = [example["images"] if "images" in example else [example["image"]] for example in examples]
        images = self.processor.image_processor(images=[image for row in shown for image in row], return_tensors="pt")
        asked_about = [pair for example in examples for pair in pairs(example["messages"])]
        turns = [tokenize_turn(self.processor, *pair) for pair in asked_about]
        rows, start = [], 0
        for example, row in zip(examples, shown, strict=True):
            rows += [list(range(start, start + len(row)))] * (len(example["messages"]) // 2)
            start += len(row)
        ids = [torch.tensor(question + answer) for question, answer in turns]
        asked = [torch.tensor([1] * len(question) + [0] * len(answer)) for question, answer in turns]
        labels = [torch.tensor([IGNORED] * len(question) + answer) for question, answer in turns]
        return {
            "pixel_values": images.pixel_values,
            "frames": pad_frames(rows),
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "question_mask": pad_sequence(asked, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }


def pad_frames(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Indices of images, padded on the left: `(num_questions, num_frames)`."""
    return pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=NO_FRAME, padding_side="left"
    )


@torch.no_grad()
def llama_vid_reader(
    model: VoCoLlamaForConditionalGeneration, processor: VoCoLlamaProcessor, frames: Sequence[Image.Image]
) -> VideoReader:
    """Reads videos from two tokens a frame, which every question makes anew of its vision tokens."""
    asked, llava, tokenizer = LlamaVid(model).eval(), as_llava(model), processor.tokenizer
    pixel_values = processor.image_processor(images=list(frames), return_tensors="pt").pixel_values
    vision = torch.cat(
        [model.model.get_vision_features(part.to(model.device, model.dtype)) for part in pixel_values.split(64)]
    )

    def show(shown: list[list[int]]) -> Reader:
        @torch.no_grad()
        def read(questions: list[str], videos: list[int]) -> list[str]:
            asked_about = make_prompts(processor, questions, "video")
            prompts = [prompt.removeprefix(processor.video_token) for prompt in asked_about]
            inputs = tokenizer(
                prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
            ).to(model.device)
            mask = inputs["attention_mask"]
            rows = pad_frames([shown[video] for video in videos]).to(model.device)
            embeddings, mask = asked.embed(vision, rows, inputs["input_ids"], mask, mask)
            ids = llava.generate(
                inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False
            )
            return decode_answers(processor, ids)

        return read

    return show
