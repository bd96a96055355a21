"""VoCo-LLaMA on ONNX Runtime: the graphs of `voco-llama export onnx` behind the interface of the model."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from huggingface_hub import HfApi
from transformers import AutoModel, Cache, DynamicCache, GenerationConfig
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ..files import new_folder
from ..modeling import VoCoCache, VoCoLlamaConfig, VoCoLlamaForConditionalGeneration
from ..modeling.batches_voco_llama import compress_in_batches
from ..modeling.cache_voco_llama import check_cache
from ..modeling.compat_voco_llama import CACHE
from ..modeling.compression_voco_llama import COMPRESSION_BATCH_SIZE, fit_counts
from ..modeling.generation_voco_llama import VoCoLlamaGenerationMixin
from ..modeling.injection_voco_llama import CompressedImages
from ..modeling.layout_voco_llama import per_image_counts
from ..modeling.outputs_voco_llama import VoCoLlamaCausalLMOutputWithPast
from ..modeling.rotation_voco_llama import rotate_keys
from .files import FINGERPRINT
from .loading import HUB_OPTIONS, find_exported, find_processor
from .past import read_cache, write_cache
from .prefill import KeyValues, prefill
from .providers import Providers, resolve_providers
from .session import TorchSession
from .signature import Signature
from .vision import build_vision_side


# Arguments that transformers hands to the forward of every model, and that the graphs have no use for
UNUSED = {*TransformersKwargs.__optional_keys__, "tokenizer", "assistant_tokenizer"}


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
        vision ([`TorchSession`], *optional*):
            The graph that makes vision tokens of tiles, for a model that divides images into them.
        files (`Sequence[Path]`, *optional*):
            The graphs and whatever else [`save_pretrained`] copies beside the configurations.

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
        files: Sequence[Path] = (),
        vision: TorchSession | None = None,
    ):
        self.compressor, self.decoder = compressor, decoder
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self._files = list(files)
        self._aside: tempfile.TemporaryDirectory | None = None
        text_config, is_tiled = config.text_config, config.base_model_type != "llava"
        if is_tiled != (vision is not None):
            raise ValueError(
                f"a model of base_model_type {config.base_model_type} has {'a' if is_tiled else 'no'} vision model"
            )
        self._vision = None if vision is None else build_vision_side(vision, config)
        self._signature = Signature(text_config, is_tiled)  # type: ignore[arg-type]
        self._signature.check(compressor, decoder)
        self.dtype, _ = decoder.output_types["present.0.key"]
        self.device = decoder.device
        # Images are put in at their place, for which their keys are rotated
        with torch.device("meta"):
            rotary_class = type(AutoModel.from_config(text_config).rotary_emb)
        self.rotary_emb = rotary_class(text_config).to(self.device)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike,
        config: VoCoLlamaConfig | None = None,
        export: bool = False,
        provider: str = "CPUExecutionProvider",
        provider_options: Sequence[dict[str, Any]] | dict[str, Any] | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
        providers: Providers | None = None,
        use_io_binding: bool | None = None,
        trust_remote_code: bool = False,
        **kwargs,
    ) -> "ORTVoCoLlamaForConditionalGeneration":
        """
        Args:
            model_id (`str` or `os.PathLike`):
                Folder or Hub id of an exported model, whose graphs may lie in its folder `onnx`, or with `export=True`
                of one for PyTorch.
            config ([`VoCoLlamaConfig`], *optional*):
                Configuration, instead of the one saved.
            export (`bool`, *optional*, defaults to `False`):
                Whether to export the model on the fly, into a folder that lives as long as the process.
            provider (`str`, *optional*, defaults to `"CPUExecutionProvider"`):
                Execution provider of ONNX Runtime.
            provider_options (`dict` or `Sequence[dict]`, *optional*):
                Options of the provider, or of each of `providers`.
            session_options (`onnxruntime.SessionOptions`, *optional*):
                Options of both sessions.
            providers (`Sequence[str | tuple[str, dict]]`, *optional*):
                Several providers instead of one, the preferred one first.
            use_io_binding (`bool`, *optional*):
                Taken as Optimum's models take it. Inputs and outputs are bound in place in any case.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Taken as Optimum's models take it. No code of a repository is run in any case.
            kwargs:
                What [`~transformers.utils.cached_file`] takes: `cache_dir`, `force_download`, `local_files_only`,
                `token`, `revision` and `subfolder`. With `export=True` also what [`export_onnx`] takes.

        Raises:
            OSError: if there is no such model.
            ValueError: if a provider is not there, or the graphs are damaged or of another model.
        """
        chosen = resolve_providers(provider, providers, provider_options)
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if kwargs.get(name) is not None}
        aside = None
        if export:
            aside = tempfile.TemporaryDirectory(prefix="voco-llama-onnx-")
            export_aside(model_id, Path(aside.name) / "model", {"provider": chosen[0][0], **kwargs}, hub)
            model_id, hub, kwargs = Path(aside.name) / "model", {}, {}
        if kwargs:
            raise TypeError(f"from_pretrained got unexpected keyword arguments {sorted(kwargs)}")
        files = find_exported(model_id, config, **hub)
        compressor, decoder = (
            TorchSession(path, chosen, session_options) for path in (files.compressor, files.decoder)
        )
        vision = None if files.vision is None else TorchSession(files.vision, chosen, session_options)
        model = cls(compressor, decoder, files.config, files.generation_config, files.copied, vision)
        model._aside = aside  # the graphs are mapped, and saved from here
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload VoCo-LLaMA in ONNX",
    ) -> None:
        """Copies graphs, configuration and processor to a new folder, and with `push_to_hub=True` to the Hub."""
        target = Path(save_directory)
        with new_folder(target) as aside:
            for path in self._files:
                shutil.copyfile(path, aside / path.name)
            self.config.save_pretrained(aside)
            self.generation_config.save_pretrained(aside)
        if push_to_hub:
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id or target.name, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=repo_id, folder_path=target, commit_message=commit_message)

    def __call__(self, *args, **kwargs) -> VoCoLlamaCausalLMOutputWithPast:
        return self.forward(*args, **kwargs)

    def can_generate(self) -> bool:
        return True

    def modules(self) -> Iterator[torch.nn.Module]:
        """None: nothing here is a module of PyTorch."""
        return iter(())

    @staticmethod
    def is_remote_code() -> bool:
        return False

    @staticmethod
    def get_experts_implementation() -> dict[str, str]:
        return {}

    def eval(self) -> "ORTVoCoLlamaForConditionalGeneration":
        return self

    def to(self, device: str | int | torch.device) -> "ORTVoCoLlamaForConditionalGeneration":
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
        image_sizes: torch.Tensor | None = None,
    ) -> VoCoCache:
        """See [`VoCoLlamaModel.compress`]."""
        if len(pixel_values) == 0:
            raise ValueError("compress needs at least one image")
        if self._vision is None and image_sizes is not None:
            raise ValueError("VoCo-LLaMA does not take image_sizes: this model's images are squares of one size")
        default = self.config.num_voco_tokens if num_voco_tokens is None else num_voco_tokens
        counts = per_image_counts(default, len(pixel_values))
        # Without tiles the compressor itself reads pixels
        read: Any = self._vision.get_vision_features if self._vision is not None else lambda pixels: pixels
        keys, values = compress_in_batches(
            read, self._compress_alike, pixel_values, image_sizes, counts, batch_size, show_progress
        )
        return VoCoCache(keys, values, counts, self.fingerprint())

    def _compress_alike(self, images: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Keys and values `(tokens, layers, key_value_heads, head_dim)` of the VoCo tokens of images of one length."""
        shape = (len(images), self._signature.heads, max(counts), self._signature.head_dim)
        presents = self.compressor.run(
            {self._signature.images: images, "num_voco_tokens": torch.tensor(max(counts))},
            dict.fromkeys(self._signature.presents, shape),
        )
        wanted = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        return [
            torch.stack([presents[name] for name in names], dim=1).permute(0, 3, 1, 2, 4)[wanted.to(self.device)]
            for names in (self._signature.presents[::2], self._signature.presents[1::2])
        ]

    def get_compressed_images(
        self,
        pixel_values: torch.Tensor | None,
        voco_cache: VoCoCache | None,
        num_voco_tokens: int | list[int] | torch.Tensor | None,
        voco_mask: np.ndarray,
        start: int = 0,
        image_sizes: torch.Tensor | None = None,
        **vision_options,
    ) -> CompressedImages:
        """See [`VoCoLlamaModel.get_compressed_images`]; what the vision tower hands on is fixed in the graph."""
        if chosen := sorted(name for name, value in vision_options.items() if value is not None):
            raise ValueError(f"{chosen[0]} is fixed in the exported graph: export a model whose configuration says it")
        given: Any = pixel_values if voco_cache is None else voco_cache  # one of both is there
        counts = fit_counts(voco_mask, len(given), num_voco_tokens, voco_cache)
        if voco_cache is None:
            voco_cache = self.compress(given, counts, show_progress=False, image_sizes=image_sizes)
        else:
            check_cache(voco_cache, self.config, self.fingerprint())
        return CompressedImages.place(voco_cache.keys, voco_cache.values, None, counts, voco_mask, start)

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):  # type: ignore[override]
        """
        See [`VoCoLlamaForConditionalGeneration.generate`].

        Raises:
            ValueError: also if a prompt ends with an image.
        """
        input_ids = inputs if kwargs.get("input_ids") is None else kwargs["input_ids"]
        is_given = kwargs.get("pixel_values") is not None and input_ids is not None
        if is_given and self.get_voco_mask(input_ids)[:, -1].any():
            raise ValueError(
                "on ONNX Runtime a prompt must end with text, but its last token is <voco>: only the keys and values "
                "of images are exported"
            )
        return super().generate(inputs, *args, **kwargs)

    @torch.no_grad()
    @can_return_tuple
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
        compressed_images: CompressedImages | None = None,
        cache: Cache | None = None,
        use_cache: bool = True,
        attention_mode: str | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs,
    ) -> VoCoLlamaCausalLMOutputWithPast:
        """
        See [`VoCoLlamaForConditionalGeneration.forward`]. Logits at `<voco>` tokens are zeros: only the keys and
        values of images are exported.

        Raises:
            TypeError: if an argument is neither one of these nor one that transformers hands to every model.
            ValueError: if images and `<voco>` tokens do not fit, or something is asked for that the graphs lack.
        """
        if unknown := sorted(kwargs.keys() - UNUSED):
            raise TypeError(f"forward got unexpected keyword arguments {unknown}")
        if labels is not None:
            raise ValueError("the exported graphs compute no loss: take it from the logits")
        if attention_mode not in (None, "voco"):
            raise ValueError(f'the exported graphs compute attention_mode="voco" only, got {attention_mode!r}')
        voco_mask = self.get_voco_mask(input_ids, inputs_embeds)
        assert input_ids is not None
        if output_attentions or output_hidden_states:
            raise ValueError("the exported decoder returns neither attentions nor hidden states")
        given = sum(images is not None for images in (pixel_values, voco_cache, compressed_images))
        if given > 1:
            raise ValueError("pass the images once: as pixel_values, as a voco_cache or as compressed_images")
        if cache is None:
            cache = DynamicCache() if past_key_values is None else past_key_values
        past = read_cache(cache, self._signature, len(input_ids), self.dtype, self.device)
        past_length, (batch_size, length) = past[0][0].shape[2], input_ids.shape
        if pixel_values is not None or voco_cache is not None:
            compressed_images = self.get_compressed_images(
                pixel_values, voco_cache, num_voco_tokens, voco_mask.cpu().numpy(), past_length, image_sizes
            )
        if attention_mask is None:
            attention_mask = torch.ones(len(input_ids), past_length + length, dtype=torch.long)
        if position_ids is None:
            position_ids = torch.arange(past_length, past_length + length)[None]
        position_ids = position_ids.expand(len(input_ids), -1)
        logits: torch.Tensor | None
        if compressed_images is None or not compressed_images.stand_in(past_length, length):
            logits, present = self._decode(input_ids, attention_mask, position_ids, past)
        else:
            images = compressed_images.window(past_length, length, batch_size)
            places = torch.from_numpy(images.rows), torch.from_numpy(images.columns)
            is_image = torch.zeros(batch_size, length, dtype=torch.bool).index_put(places, torch.tensor(True))
            position_ids = position_ids.cpu()
            placed = self._place_images(images, position_ids[places])
            logits, present = prefill(
                *(self._decode, input_ids.cpu(), attention_mask.cpu(), position_ids, past, is_image, placed)
            )
        if logits is None:
            vocab_size = self.config.text_config.vocab_size
            logits = torch.zeros(*input_ids.shape, vocab_size, dtype=self.dtype, device=self.device)
        if use_cache:
            write_cache(cache, present)
        logits = slice_logits_to_keep(logits, logits_to_keep)
        named_cache: dict[str, Any] = {CACHE: cache if use_cache else None}
        return VoCoLlamaCausalLMOutputWithPast(logits=logits, **named_cache)

    def _decode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: KeyValues
    ) -> tuple[torch.Tensor, KeyValues]:
        """One run of the decoder."""
        batch_size, length = input_ids.shape
        heads, past_length, head_dim = past[0][0].shape[1:]
        present = (batch_size, heads, past_length + length, head_dim)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= zip(self._signature.pasts, (states for layer in past for states in layer))
        shapes: dict[str, tuple[int, ...]] = {
            "logits": (batch_size, length, self.config.text_config.vocab_size),
            **dict.fromkeys(self._signature.presents, present),
        }
        outputs = self.decoder.run(inputs, shapes)
        states = [outputs[name] for name in self._signature.presents]
        return outputs["logits"], list(zip(states[::2], states[1::2]))

    def _place_images(self, images: CompressedImages, positions: torch.Tensor) -> torch.Tensor:
        """Keys, at their positions, and values `(2, layers, tokens, key_value_heads, head_dim)` of images."""
        moved = positions - torch.from_numpy(images.offsets)
        keys = rotate_keys(images.keys.to(self.device), moved.to(self.device), self.rotary_emb)
        return torch.stack([keys, images.values.to(self.device)]).transpose(1, 2).to(self.dtype)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config, model_kwargs: dict, *args, **kwargs
    ) -> None:
        """Graphs take the keys and values of every token, so sliding windows do not shorten the cache."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not supported on ONNX Runtime, "
                "whose keys and values are in a DynamicCache"
            )
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = DynamicCache()
        elif generation_config.use_cache:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, *args, **kwargs
            )


def export_aside(model_id: str | os.PathLike, folder: Path, options: dict[str, Any], hub: dict[str, Any]) -> None:
    """Exports a model for PyTorch, with its processor if it has one, to a folder."""
    from .exporter import export_onnx

    source = VoCoLlamaForConditionalGeneration.from_pretrained(model_id, dtype="auto", **hub)
    export_onnx(source, folder, **{"processor": find_processor(model_id, **hub), **options})
