"""VoCo-LLaMA on ONNX Runtime: the graphs of `voco-llama export onnx` behind the interface of the model."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from huggingface_hub import HfApi
from transformers import AutoModel, Cache, DynamicCache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.hub import cached_file, cached_files

from ..files import check_inside, new_folder
from ..modeling import VoCoCache, VoCoLlamaConfig, VoCoLlamaForConditionalGeneration
from ..modeling.cache_voco_llama import check_cache
from ..modeling.configuration_voco_llama import key_value_shape
from ..modeling.generation_voco_llama import VoCoLlamaGenerationMixin
from ..modeling.layout_voco_llama import per_image_counts, resolve_num_voco_tokens
from ..modeling.modeling_voco_llama import COMPRESSION_BATCH_SIZE
from ..modeling.rotation_voco_llama import rotate_keys
from .files import COMPRESSOR_FILE, DECODER_FILE, FINGERPRINT, data_file
from .prefill import KeyValues, prefill
from .session import TorchSession, check_provider


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class ORTVoCoLlamaForConditionalGeneration(VoCoLlamaGenerationMixin):
    r"""
    VoCo-LLaMA for ONNX Runtime, with `compress` and `generate` of [`VoCoLlamaForConditionalGeneration`]. Keys and
    values stay on the device of the provider. Load it with [`from_pretrained`].

    Args:
        compressor ([`TorchSession`]):
            The graph that compresses images.
        decoder ([`TorchSession`]):
            The graph that reads and writes text.
        config ([`VoCoLlamaConfig`]):
            Configuration of the model that was exported.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            How `generate` works by default.
        model_save_dir (`str` or `Path`, *optional*):
            Folder that the graphs come from.

    Raises:
        ValueError: if the graphs are not those of a model with this configuration.

    Example:

    ```python
    >>> from transformers import AutoProcessor
    >>> from voco_llama_hf.export import ORTVoCoLlamaForConditionalGeneration

    >>> model = ORTVoCoLlamaForConditionalGeneration.from_pretrained(folder)
    >>> processor = AutoProcessor.from_pretrained(folder)
    >>> inputs = processor(images=image, text="<image>\nWhat is this?", return_tensors="pt")
    >>> processor.batch_decode(model.generate(**inputs, max_new_tokens=20), skip_special_tokens=True)
    ```"""

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    output_modalities = ("text",)
    base_model_prefix = "model"
    _is_stateful = False

    def __init__(
        self,
        compressor: TorchSession,
        decoder: TorchSession,
        config: VoCoLlamaConfig,
        generation_config: GenerationConfig | None = None,
        model_save_dir: str | Path | None = None,
    ):
        self.compressor, self.decoder = compressor, decoder
        self.config: Any = config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self.model_save_dir = model_save_dir
        self._aside: tempfile.TemporaryDirectory | None = None
        text_config: Any = config.text_config
        layers, heads, head_dim = self._key_value_shape = key_value_shape(text_config)
        self._presents = [f"present.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
        self._pasts = [name.replace("present", "past_key_values") for name in self._presents]
        check_graph(compressor, "compressor", ["pixel_values", "num_voco_tokens"], self._presents, (heads, head_dim))
        text = ["input_ids", "attention_mask", "position_ids"]
        check_graph(decoder, "decoder", [*text, *self._pasts], ["logits", *self._presents], (heads, head_dim))
        self.dtype, _ = decoder.output_types["present.0.key"]
        self.device = decoder.device
        # Images are put in at their place, for which their keys are rotated
        with torch.device("meta"):
            rotary_class: Any = type(AutoModel.from_config(text_config).rotary_emb)
        self.rotary_emb = rotary_class(text_config).to(self.device)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike,
        config: VoCoLlamaConfig | None = None,
        export: bool = False,
        provider: str = "CPUExecutionProvider",
        provider_options: dict[str, Any] | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
        **kwargs,
    ) -> "ORTVoCoLlamaForConditionalGeneration":
        """
        Args:
            model_id (`str` or `os.PathLike`):
                Folder or Hub id of an exported model, or with `export=True` of one for PyTorch.
            config ([`VoCoLlamaConfig`], *optional*):
                Configuration, instead of the one saved.
            export (`bool`, *optional*, defaults to `False`):
                Whether to export the model on the fly, into a folder that lives as long as the process.
            provider (`str`, *optional*, defaults to `"CPUExecutionProvider"`):
                Execution provider of ONNX Runtime.
            provider_options (`dict[str, Any]`, *optional*):
                Options of the provider.
            session_options (`onnxruntime.SessionOptions`, *optional*):
                Options of both sessions.
            kwargs:
                What [`~transformers.utils.cached_file`] takes: `cache_dir`, `force_download`, `local_files_only`,
                `token`, `revision` and `subfolder`. With `export=True` also what [`export_onnx`] takes.

        Raises:
            OSError: if there is no such model.
            ValueError: if the provider is not there, or the graphs are damaged or of another model.
        """
        check_provider(provider)
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        if export:
            from .exporter import export_onnx

            source = VoCoLlamaForConditionalGeneration.from_pretrained(model_id, dtype="auto", **hub)
            aside = tempfile.TemporaryDirectory(prefix="voco-llama-onnx-")
            export_onnx(source, Path(aside.name) / "model", provider=provider, **kwargs)
            model = cls.from_pretrained(
                Path(aside.name) / "model", config, False, provider, provider_options, session_options
            )
            model._aside = aside  # the graphs are mapped, and saved from here
            return model
        if kwargs:
            raise TypeError(f"from_pretrained got unexpected keyword arguments {sorted(kwargs)}")
        compressor_file = cached_file(model_id, COMPRESSOR_FILE, **hub)
        cached_files(model_id, [COMPRESSOR_FILE, DECODER_FILE, "config.json"], **hub)
        optional = [data_file(COMPRESSOR_FILE), data_file(DECODER_FILE), "generation_config.json"]
        cached_files(model_id, optional, _raise_exceptions_for_missing_entries=False, **hub)
        folder = Path(str(compressor_file)).parent
        if config is None:
            config = VoCoLlamaConfig.from_pretrained(folder)
        generation_config = None
        if (folder / "generation_config.json").exists():
            generation_config = GenerationConfig.from_pretrained(folder)
        compressor, decoder = (
            TorchSession(folder / file, provider, provider_options, session_options)
            for file in (COMPRESSOR_FILE, DECODER_FILE)
        )
        return cls(compressor, decoder, config, generation_config, folder)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload VoCo-LLaMA in ONNX",
    ) -> None:
        """Copies graphs and configuration to a new folder, and with `push_to_hub=True` to the Hub."""
        source, target = Path(str(self.model_save_dir)), Path(save_directory)
        with new_folder(target) as aside:
            for path in source.iterdir():
                if path.is_file():
                    check_inside(source, path)
                    shutil.copyfile(path, aside / path.name)
            self.config.save_pretrained(aside)
            self.generation_config.save_pretrained(aside)
        if push_to_hub:
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id or target.name, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=repo_id, folder_path=target, commit_message=commit_message)

    def __call__(self, *args, **kwargs) -> LlavaCausalLMOutputWithPast:
        return self.forward(*args, **kwargs)

    def can_generate(self) -> bool:
        return True

    @staticmethod
    def is_remote_code() -> bool:
        return False

    @staticmethod
    def get_experts_implementation() -> dict[str, str]:
        return {}

    def eval(self) -> "ORTVoCoLlamaForConditionalGeneration":
        return self

    def to(self, device: Any) -> "ORTVoCoLlamaForConditionalGeneration":
        """
        Raises:
            ValueError: if it asks for another device than that of the provider.
        """
        if torch.device(device).type != self.device.type:
            raise ValueError(f"the model runs on {self.device}, as its provider does: load it with another provider")
        return self

    def fingerprint(self) -> dict[str, str]:
        """See [`VoCoLlamaModel.fingerprint`]: that of the model which was exported."""
        return json.loads(self.compressor.metadata[FINGERPRINT])

    def get_voco_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """See [`VoCoLlamaModel.get_voco_mask`]."""
        if input_ids is None:
            raise ValueError("the exported decoder takes input_ids, not inputs_embeds")
        return input_ids == self.config.voco_token_id

    def compress(
        self,
        pixel_values: torch.Tensor,
        num_voco_tokens: int | list[int] | torch.Tensor | None = None,
        batch_size: int = COMPRESSION_BATCH_SIZE,
        show_progress: bool = True,
    ) -> VoCoCache:
        """See [`VoCoLlamaModel.compress`]."""
        if len(pixel_values) == 0:
            raise ValueError("compress needs at least one image")
        default = self.config.num_voco_tokens if num_voco_tokens is None else num_voco_tokens
        counts = per_image_counts(default, len(pixel_values))
        starts = range(0, len(pixel_values), batch_size)
        parts = [
            self._compress_batch(pixel_values[start : start + batch_size], counts[start : start + batch_size])
            for start in logging.tqdm(starts, desc="Compressing images", disable=not show_progress or len(starts) == 1)
        ]
        keys, values = (torch.cat(tensors) for tensors in zip(*parts))
        return VoCoCache(keys, values, counts, self.fingerprint())

    def _compress_batch(self, pixel_values: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(tokens, layers, key_value_heads, head_dim)` of the VoCo tokens of a batch of images."""
        _, heads, head_dim = self._key_value_shape
        shape = (len(pixel_values), heads, max(counts), head_dim)
        presents = self.compressor.run(
            {"pixel_values": pixel_values, "num_voco_tokens": torch.tensor(max(counts))},
            dict.fromkeys(self._presents, shape),
        )
        wanted = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        keys, values = (
            torch.stack([presents[name] for name in names], dim=1).permute(0, 3, 1, 2, 4)[wanted.to(self.device)]
            for names in (self._presents[::2], self._presents[1::2])
        )
        return keys, values

    def get_image_features(
        self,
        pixel_values: Any = None,
        num_voco_tokens: int | list[int] | torch.Tensor | None = None,
        voco_cache: VoCoCache | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling:
        """See [`VoCoLlamaModel.get_image_features`]; its rows are keys at position 0 and values."""
        if (voco_cache is None) == (pixel_values is None):
            raise ValueError("pass the images either as pixel_values or as a voco_cache")
        if voco_cache is None:
            voco_cache = self.compress(pixel_values, num_voco_tokens, show_progress=False)
        else:
            check_cache(voco_cache, self.config, self.fingerprint())
            voco_cache.resolve(num_voco_tokens)
            voco_cache = voco_cache.to(self.device)
        offsets = torch.cat([torch.arange(count) for count in voco_cache.token_counts]).to(self.device)
        at_zero = rotate_keys(voco_cache.keys, -offsets, self.rotary_emb)
        rows = torch.cat([at_zero.flatten(1), voco_cache.values.flatten(1)], dim=-1)
        images: Any = list(rows.split(voco_cache.token_counts))
        return BaseModelOutputWithPooling(pooler_output=images)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_voco_tokens: int | list[int] | torch.Tensor | None = None,
        voco_cache: VoCoCache | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
    ) -> LlavaCausalLMOutputWithPast:
        """
        See [`VoCoLlamaForConditionalGeneration.forward`]. Logits at `<voco>` tokens are zeros: only the keys and
        values of images are exported.

        Raises:
            ValueError: if images and `<voco>` tokens do not fit, or something is asked for that the graphs lack.
        """
        voco_mask = self.get_voco_mask(input_ids, inputs_embeds)
        assert input_ids is not None
        if output_attentions or output_hidden_states:
            raise ValueError("the exported decoder returns neither attentions nor hidden states")
        features = None if mm_encoder_outputs is None else mm_encoder_outputs.get("image")
        if sum(images is not None for images in (pixel_values, voco_cache, features)) > 1:
            raise ValueError("pass the images once: as pixel_values, as a voco_cache or as mm_encoder_outputs")
        images: Any = pixel_values if voco_cache is None else voco_cache
        if images is not None:
            if voco_cache is not None and num_voco_tokens is None:
                num_voco_tokens = voco_cache.token_counts
            counts = resolve_num_voco_tokens(num_voco_tokens, len(images), int(voco_mask.sum()))
            features = self.get_image_features(pixel_values, counts, voco_cache)

        cache: Any = DynamicCache() if past_key_values is None else past_key_values
        past = self._read_cache(cache, len(input_ids))
        past_length, length = past[0][0].shape[2], input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(len(input_ids), past_length + length, dtype=torch.long)
        if position_ids is None:
            position_ids = torch.arange(past_length, past_length + length)[None]
        position_ids = position_ids.expand(len(input_ids), -1)
        if features is None or not voco_mask.any():
            logits: torch.Tensor | None
            logits, present = self._decode(input_ids, attention_mask, position_ids, past)
        else:
            rows: Any = features.pooler_output
            placed = self._place_images(torch.cat(list(rows)), position_ids[voco_mask.to(position_ids.device)])
            logits, present = prefill(
                *(self._decode, input_ids.cpu(), attention_mask.cpu(), position_ids.cpu(), past),
                *(voco_mask.cpu(), placed),
            )
        if logits is None:
            vocab_size = self.config.text_config.vocab_size
            logits = torch.zeros(*input_ids.shape, vocab_size, dtype=self.dtype, device=self.device)
        if use_cache:
            write_cache(cache, present)
        return LlavaCausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)

    def _decode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: KeyValues
    ) -> tuple[torch.Tensor, KeyValues]:
        """One run of the decoder."""
        batch_size, length = input_ids.shape
        heads, past_length, head_dim = past[0][0].shape[1:]
        present = (batch_size, heads, past_length + length, head_dim)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= zip(self._pasts, (states for layer in past for states in layer))
        shapes: dict[str, tuple[int, ...]] = {
            "logits": (batch_size, length, self.config.text_config.vocab_size),
            **dict.fromkeys(self._presents, present),
        }
        outputs = self.decoder.run(inputs, shapes)
        states = [outputs[name] for name in self._presents]
        return outputs["logits"], list(zip(states[::2], states[1::2]))

    def _place_images(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys, at their positions, and values `(2, layers, tokens, key_value_heads, head_dim)` of images."""
        layers, heads, head_dim = self._key_value_shape
        if rows.shape != (len(positions), 2 * layers * heads * head_dim):
            raise ValueError(
                f"the input has {len(positions)} <voco> tokens and the model {2 * layers * heads * head_dim} numbers "
                f"a token, but its images were compressed into {tuple(rows.shape)}"
            )
        keys, values = rows.to(self.device).view(-1, 2, layers, heads, head_dim).unbind(1)
        keys = rotate_keys(keys, positions.to(self.device), self.rotary_emb)
        return torch.stack([keys, values]).transpose(1, 2).to(self.dtype)

    def _read_cache(self, cache: Any, batch_size: int) -> KeyValues:
        """
        Raises:
            ValueError: if the cache is not a dynamic one, or has another number of layers.
        """
        layers, heads, head_dim = self._key_value_shape
        if cache.get_seq_length() == 0:
            empty = torch.empty(batch_size, heads, 0, head_dim, dtype=self.dtype, device=self.device)
            return [(empty, empty)] * layers
        if type(cache) is not DynamicCache or len(cache.layers) != layers:
            raise ValueError(
                f"past_key_values must be a DynamicCache of {layers} layers, got a {type(cache).__name__} of "
                f"{len(cache.layers)}"
            )
        cached: Any = cache.layers
        return [(layer.keys, layer.values) for layer in cached]

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs: dict, *args, **kwargs) -> dict:
        is_text = inputs_tensor.ndim == 2
        if model_kwargs.get("pixel_values") is not None and is_text and self.get_voco_mask(inputs_tensor)[:, -1].any():
            raise ValueError(
                "on ONNX Runtime a prompt must end with text, but its last token is <voco>: only the keys and values "
                "of images are exported"
            )
        return super()._maybe_prepare_encoder_kwargs_for_generation(inputs_tensor, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config, model_kwargs: dict, *args, **kwargs
    ) -> None:
        """Graphs take the keys and values of every token, so sliding windows do not shorten the cache."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not supported on ONNX Runtime, "
                "whose keys and values are in a DynamicCache"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = DynamicCache()
        elif generation_config.use_cache:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, *args, **kwargs
            )


def write_cache(cache: Any, present: KeyValues) -> None:
    """Makes `present` the content of a cache, without a copy where it has layers already."""
    for number, (keys, values) in enumerate(present):
        if number == len(cache.layers) or not cache.layers[number].is_initialized:
            cache.update(keys, values, number)
        else:
            cache.layers[number].keys, cache.layers[number].values = keys, values


def check_graph(
    session: TorchSession, name: str, inputs: list[str], outputs: list[str], present: tuple[int, int]
) -> None:
    """
    Raises:
        ValueError: if a graph has other inputs or outputs than its configuration asks for.
    """
    for kind, expected, found in (
        ("inputs", inputs, set(session.input_types)),
        ("outputs", outputs, set(session.output_types)),
    ):
        if differing := sorted(set(expected) ^ found):
            raise ValueError(
                f"the {name} is not a graph of this model: it has other {kind} than its configuration says, first "
                f"{differing[0]}"
            )
    shapes = {tuple(value.shape[1::2]) for value in session.session.get_outputs() if value.name.startswith("present")}
    if shapes != {present}:
        raise ValueError(
            f"the {name} is not a graph of this model: its keys and values have (heads, head size) "
            f"{sorted(shapes)}, its configuration says {present}"
        )
    if name == "compressor" and FINGERPRINT not in session.metadata:
        raise ValueError("the compressor is not a graph of this package: it does not say which model it is of")
