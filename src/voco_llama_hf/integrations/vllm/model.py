"""The model that vLLM runs: transformers' vision tower, vLLM's text model, and what is between them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, LlavaModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from ...modeling.batches_voco_llama import compress_in_batches
from ...modeling.configuration_voco_llama import VoCoLlamaConfig, key_value_shape
from ...modeling.modeling_voco_llama import MODELS
from .injection import Recorder, Rows, inject
from .limits import max_segment_length, num_rows
from .processing import VoCoLlamaDummyInputsBuilder, VoCoLlamaMultiModalProcessor, VoCoLlamaProcessingInfo


class VisionParts(LlavaModel):
    """[`~transformers.LlavaModel`] without its text model."""

    def __init__(self, config: VoCoLlamaConfig):
        super(LlavaModel, self).__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)


def build_vision_side(config: VoCoLlamaConfig) -> Any:
    """The model of transformers that reads images, of whatever class the configuration names, without a text model."""
    return type("VisionSide", (MODELS[config.base_model_type], VisionParts), {})(config)


@MULTIMODAL_REGISTRY.register_processor(
    VoCoLlamaMultiModalProcessor, info=VoCoLlamaProcessingInfo, dummy_inputs=VoCoLlamaDummyInputsBuilder
)
class VoCoLlamaForConditionalGeneration(nn.Module, SupportsMultiModal):
    """
    An image's embedding is a row for each of its VoCo tokens: keys before their rotation and values of every layer,
    and the last hidden state, `(k, 2 * layers * kv_heads * head_dim + hidden_size)` with the heads of this rank. vLLM
    keeps and slices such rows as it does any embeddings; [`Rows`] puts them in when their tokens are run.
    """

    packed_modules_mapping = {  # noqa: RUF012  # read by vLLM's quantization
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    # What is saved by transformers 5, and by LLaVA's older classes
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision.vision_tower.",
            "model.multi_modal_projector.": "vision.multi_modal_projector.",
            "model.image_newline": "vision.image_newline",
            "vision_tower.": "vision.vision_tower.",
            "multi_modal_projector.": "vision.multi_modal_projector.",
            "image_newline": "vision.image_newline",
            "lm_head.": "language_model.lm_head.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return f"<{modality}>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        text_config = self.config.text_config
        self.vision = build_vision_side(self.config).to(vllm_config.model_config.dtype).eval()
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, hf_config=text_config, prefix=maybe_prefix(prefix, "language_model")
        )
        layers, self.num_total_heads, head_dim = key_value_shape(text_config)
        self.num_heads = vllm_config.model_config.get_num_kv_heads(vllm_config.parallel_config)
        self.max_batch_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self.rows = Rows(
            num_rows(vllm_config), self.max_batch_tokens, self.num_heads * head_dim, layers, text_config.hidden_size
        )
        inject(self.language_model.model.layers, self.rows)

    def embed_multimodal(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor],
        stored_rows: torch.Tensor | list[torch.Tensor],
        num_voco_tokens: torch.Tensor,
        image_sizes: torch.Tensor | list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` or `list[torch.Tensor]`):
                Segments of each image, one unless its tiles are compressed apart: `(num_segments, 3, height, width)`,
                or `(num_segments, num_tiles, 3, height, width)`; nothing for an image that is stored.
            stored_rows (`torch.Tensor` or `list[torch.Tensor]`):
                Rows of images that are compressed already, with the heads of all ranks; nothing for others.
            num_voco_tokens (`torch.LongTensor`):
                VoCo tokens of each image, which its segments share evenly.
            image_sizes (`torch.Tensor` or `list[torch.Tensor]`, *optional*):
                Of a model that divides images into tiles, sizes `(num_segments, 2)` of each image, see
                [`TiledImages`].

        Returns:
            `list[torch.Tensor]`: rows of each image.
        """
        counts: list[int] = num_voco_tokens.flatten().tolist()
        found = {i: self._own_heads(rows) for i, rows in enumerate(stored_rows) if rows.numel()}
        new = [i for i in range(len(counts)) if i not in found]
        owners = [i for i in new for _ in pixel_values[i]]
        segments = [segment for i in new for segment in pixel_values[i]]
        sizes = None if image_sizes is None else [size for i in new for size in image_sizes[i]]
        shares = [counts[i] // len(pixel_values[i]) for i in owners]
        parts: dict[int, list[torch.Tensor]] = {i: [] for i in new}
        for i, rows in zip(owners, self._compress_segments(segments, sizes, shares)):
            parts[i].append(rows)
        # Copied, so that what one image keeps are its own rows alone
        found |= {i: torch.cat(own) for i, own in parts.items()}
        return [found[i] for i in range(len(counts))]

    def _compress_segments(
        self, segments: list[torch.Tensor], sizes: list[torch.Tensor] | None, counts: list[int]
    ) -> list[torch.Tensor]:
        """Rows of each segment. Those of as many tiles are read together, and those of one length compressed."""
        found: dict[int, torch.Tensor] = {}
        for batch in self._batches(segments, counts):
            own_counts, pixels = [counts[n] for n in batch], torch.stack([segments[n] for n in batch])
            (rows,) = compress_in_batches(
                self.vision.get_vision_features,
                self._compress,
                pixels,
                None if sizes is None else torch.stack([sizes[n] for n in batch]),
                own_counts,
                batch_size=pixels.shape[:-3].numel(),  # all of them, counted in images or in tiles
                show_progress=False,
            )
            found |= zip(batch, rows.split(own_counts))
        return [found[n] for n in range(len(segments))]

    def _batches(self, segments: list[torch.Tensor], counts: list[int]) -> Iterator[list[int]]:
        """Segments of as many tiles each, and together of as many tokens as a step has, unless one alone has more."""
        by_shape: dict[torch.Size, list[int]] = {}
        for n, segment in enumerate(segments):
            by_shape.setdefault(segment.shape, []).append(n)
        for shape, alike in by_shape.items():
            num_tiles = shape[0] if len(shape) == 4 else 1
            length = max_segment_length(self.config, num_tiles, max(counts[n] for n in alike))
            size = max(1, self.max_batch_tokens // length)
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    def _compress(self, vision: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Rows `(sum(counts), width)`; of segments that get fewer they are the first, as attention is causal."""
        config, model, number, length = self.config, self.language_model.model, len(vision), max(counts)
        prefix, suffix, voco = (
            self._embed(ids).expand(number, -1, -1)
            for ids in (config.vision_prefix_token_ids, config.vision_suffix_token_ids, [config.voco_token_id])
        )
        segments = torch.cat([prefix, vision.to(prefix), suffix, voco.expand(-1, length, -1)], dim=1)
        positions = torch.arange(segments.shape[1], device=segments.device).repeat(number)
        self.rows.recorder = recorder = Recorder(number, length)
        try:
            hidden_states, residual = segments.flatten(0, 1), None
            for layer in model.layers:
                hidden_states, residual = layer(positions, hidden_states, residual)
            hidden_states, _ = model.norm(hidden_states, residual)
        finally:
            self.rows.recorder = None
        recorder.record(hidden_states)
        return [torch.cat([rows[:count] for rows, count in zip(recorder.rows(), counts)])]

    def _embed(self, token_ids: list[int]) -> torch.Tensor:
        ids = torch.tensor(token_ids, dtype=torch.long, device=self.rows.places.device)
        return self.language_model.embed_input_ids(ids)

    def _own_heads(self, rows: torch.Tensor) -> torch.Tensor:
        """Stored rows with the heads that this rank has. Their hidden state is unknown, and is no number."""
        hidden_size = self.config.text_config.hidden_size
        by_head = rows.unflatten(1, (-1, self.num_total_heads, self.rows.width // self.num_heads))
        # Where there are fewer heads than ranks, neighbours share one
        first = get_tensor_model_parallel_rank() * self.num_total_heads // get_tensor_model_parallel_world_size()
        own = by_head[:, :, first : first + self.num_heads].flatten(1)
        return torch.cat([own, own.new_full((len(own), hidden_size), torch.nan)], dim=1)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.rows.place(multimodal_embeddings or (), is_multimodal)
        return self.language_model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        hidden_states = self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return self.rows.put(hidden_states, self.rows.hidden_start)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        mapped = self.hf_to_vllm_mapper.apply(weights)
        return AutoWeightsLoader(self).load_weights(self._name_tower(mapped))

    def _name_tower(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Older classes of transformers have `vision_model.` in the names of a vision tower's weights."""
        own = {name for name, _ in self.vision.named_parameters(prefix="vision")}
        for name, tensor in weights:
            if name.startswith("vision.") and name not in own:
                name = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
            yield name, tensor
