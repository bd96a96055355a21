"""What compressed images were made by: a model, with its adapters, and the settings of an image processor."""

import copy
import hashlib
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from .configuration_voco_llama import VoCoLlamaConfig, key_value_shape
from .weights_voco_llama import (
    BLOCK_WORDS,
    Checksums,
    CompressingModel,
    EffectiveWeights,
    block_sums,
    is_tuner_layer,
    read_embeddings,
)


if TYPE_CHECKING:
    from transformers import BaseImageProcessor


logger = logging.get_logger(__name__)

VERSION = "2"
# Of the first version, which sampled the weights and knew little of the configuration
FIRST_VERSION = {
    "text_model",
    "layers",
    "key_value_heads",
    "head_dim",
    "voco_token_id",
    "vision_prefix_token_ids",
    "vision_suffix_token_ids",
    "weights",
}
IMAGE_PROCESSOR = "image_processor"
ADAPTER_NAMES = "adapter_names"  # for messages: the same adapter may have another name elsewhere
NONE = "none"
# Settings that no key of a compressed image depends on. What is not known is taken to matter
LEFT_OUT_SETTINGS = {
    *("architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id"),
    *("problem_type", "return_dict", "output_hidden_states", "output_attentions", "use_cache", "is_encoder_decoder"),
    *("chunk_size_feed_forward", "pretraining_tp", "initializer_range", "initializer_factor", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "vocab_size"),
    *("attention_mode", "num_voco_tokens", "image_seq_length", "projection_dim", "quantization_config"),
    *("voco_token_id", "vision_prefix_token_ids", "vision_suffix_token_ids"),  # have entries of their own
}
# Settings of what LLaVA itself has not; left out where they say that it has not, as models of before they existed do
ABSENT = {"base_model_type": "llava", "image_grid_pinpoints": None, "vision_aspect_ratio": None}
POSITION_LIMIT = "max_position_embeddings"  # matters to some kinds of rotation only
LIMITLESS_ROPE = ("default", "linear")
LEFT_OUT_IMAGE_SETTINGS = {
    *("auto_map", "image_processor_type", "processor_class", "transformers_version", "return_tensors", "data_format"),
    *("input_data_format", "device", "disable_grouping", "do_convert_rgb"),
}
# What a step of preprocessing takes; without the step it does not matter
IMAGE_STEPS = {
    "do_resize": ("size", "resample", "default_to_square", "size_divisor"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
    "do_pad": ("pad_size", "padding_value"),
}
SMALL_MODEL = 2**18  # values that are compared one by one at every question


class Fingerprint(dict[str, str]):
    """
    What compressed images were made by, as names and values. Two are equal if nothing that both know tells them apart:
    a model and its copy in another precision are, and settings of an image processor count where both have them.
    """

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return not find_differences(self, other) if isinstance(other, Mapping) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    @property
    def is_first_version(self) -> bool:
        return set(self) - {IMAGE_PROCESSOR} == FIRST_VERSION


def find_differences(made_by: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """In words, what tells two fingerprints apart."""
    names = set(made_by) | set(expected)
    if Fingerprint(made_by).is_first_version != Fingerprint(expected).is_first_version:
        names = FIRST_VERSION - {"weights"}
    ordered = [name for name in [*expected, *made_by] if name in names]
    found = []
    for name in dict.fromkeys(ordered):
        old, new = made_by.get(name), expected.get(name)
        if old == new or name == ADAPTER_NAMES or (name == IMAGE_PROCESSOR and None in (old, new)):
            continue
        if name in ("config", IMAGE_PROCESSOR):
            found += differing_settings(old, new, name)
        elif name == "adapters":
            if not are_same_weights(old, new):
                found.append(f"adapter is {named_adapters(made_by)}, not {named_adapters(expected)}")
        elif name != "weights" or not are_same_weights(old, new):
            found.append(f"{name} is {old}, not {new}")
    return found


def named_adapters(fingerprint: Mapping[str, str]) -> str:
    return fingerprint.get(ADAPTER_NAMES) or fingerprint.get("adapters") or NONE


def are_same_weights(first: str | None, second: str | None) -> bool:
    """
    Whether two lists of checksums can be of the same weights: what one model is known by in its own precision, the
    first of its list, the other would be known by if it were rounded to that precision.
    """
    if first is None or second is None or ":" not in first or ":" not in second:
        return first == second
    lists = [dict(pair.split(":", 1) for pair in text.split(" ") if ":" in pair) for text in (first, second)]
    own = [next(iter(digests)) for digests in lists]
    return any(lists[0].get(precision) == lists[1].get(precision) for precision in own)


def differing_settings(old: str | None, new: str | None, what: str) -> list[str]:
    """Settings that two descriptions in JSON both have, but with other values."""
    try:
        first, second = flatten(json.loads(old or "")), flatten(json.loads(new or ""))
    except (ValueError, RecursionError):
        return [f"{what} is {old}, not {new}"]
    names = [name for name in first if name in second and first[name] != second[name]]
    return [f"{name} is {first[name]}, not {second[name]}" for name in names]


def flatten(settings: object, prefix: str = "") -> dict[str, Any]:
    """Nested settings by names such as `"text_config.rope_parameters.rope_theta"`."""
    if not isinstance(settings, dict):
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def check_fingerprint(
    made_by: Mapping[str, str], expected: Mapping[str, str], owner: str, what: str = "this VoCoCache"
) -> None:
    """
    Compares what two caches, or a cache and a model, were made by. One of the first version, which says less, is
    compared as far as it goes, with a warning.

    Args:
        made_by (`dict[str, str]`): Fingerprint of what is to be used.
        expected (`dict[str, str]`): Fingerprint of what it is to be used with.
        owner (`str`): What messages call the latter.
        what (`str`, *optional*): What messages call the former.

    Raises:
        ValueError: if they differ; the message says where.
    """
    differences = find_differences(made_by, expected)
    if differences:
        raise ValueError(f"{what} was made by another model than {owner}: {', '.join(differences)}")
    if Fingerprint(made_by).is_first_version != Fingerprint(expected).is_first_version:
        logger.warning_once(
            f"{what} is of an older version or is used with one: that both were made with the same weights, adapters "
            "and settings (rotation, norms, feature layer) cannot be checked. Compress the images again to be sure."
        )


def join_fingerprints(first: Mapping[str, str], other: Mapping[str, str]) -> Fingerprint:
    """The fingerprint of images of both together: what is known of all of them."""
    joined = Fingerprint(other if Fingerprint(other).is_first_version else first)
    if None in (first.get(IMAGE_PROCESSOR), other.get(IMAGE_PROCESSOR)):
        joined.pop(IMAGE_PROCESSOR, None)
    return joined


def with_images(fingerprint: Mapping[str, str], image_processor: "BaseImageProcessor") -> Fingerprint:
    """
    A fingerprint that also says how the images are preprocessed.

    Args:
        fingerprint (`dict[str, str]`): As of `model.fingerprint()` or a [`VoCoCache`].
        image_processor ([`~transformers.BaseImageProcessor`]): What makes `pixel_values` of images.
    """
    return Fingerprint({**fingerprint, IMAGE_PROCESSOR: json.dumps(image_settings(image_processor), sort_keys=True)})


def image_settings(image_processor: "BaseImageProcessor") -> dict[str, Any]:
    """What decides on the pixels that an image processor returns."""
    settings = image_processor.to_dict()
    steps = {step: bool(settings.get(step)) for step in IMAGE_STEPS}
    idle = {name for step, names in IMAGE_STEPS.items() if not steps[step] for name in names}
    kept = {name: value for name, value in settings.items() if name not in idle and value is not None} | steps
    plain = json.loads(json.dumps(kept, default=str))
    return {name: value for name, value in plain.items() if name not in LEFT_OUT_IMAGE_SETTINGS and name[0] != "_"}


def compression_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """All of a configuration, and of those in it, that compressed keys may depend on."""
    rope = vars(config).get("rope_parameters") or {}
    left_out = LEFT_OUT_SETTINGS | ({POSITION_LIMIT} if rope.get("rope_type") in LIMITLESS_ROPE else set())
    return {
        name: compression_settings(value) if isinstance(value, PreTrainedConfig) else value
        for name, value in vars(config).items()
        if name not in left_out and name[0] != "_" and "dropout" not in name
        if name not in ABSENT or value != ABSENT[name]
    }


def describe_quantization(config: PreTrainedConfig, packed: set[str]) -> str:
    """Method, classes of modules, and a checksum of the settings."""
    given = vars(config).get("quantization_config")
    settings = given if isinstance(given, dict) or given is None else given.to_dict()
    if settings is None:
        return " ".join(sorted(packed)) or NONE
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return " ".join([str(settings.get("quant_method")), *sorted(packed), digest])


def describe_rotation(model: CompressingModel) -> str:
    """Whether the rotary embedding is what the configuration says; its numbers differ a little between devices."""
    rotation, config = model.language_model.rotary_emb, model.config.text_config
    buffers = {name: buffer for name, buffer in rotation.named_buffers() if not buffer.is_meta}
    configured = type(rotation)(config)
    expected = dict(configured.named_buffers())
    is_configured = rotation.attention_scaling == configured.attention_scaling and all(
        name in expected and is_close(buffer, expected[name]) for name, buffer in buffers.items()
    )
    if is_configured:
        return "as configured"
    rounded = {name: buffer.to(torch.bfloat16) for name, buffer in buffers.items()}
    return str(Checksums({**rounded, "scaling": rotation.attention_scaling}, own_only=True))


def is_close(buffer: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the precision of a buffer."""
    if buffer.shape != expected.shape:
        return False
    limits = torch.finfo(buffer.dtype)
    buffer, expected = buffer.double().cpu(), expected.double().cpu()
    return torch.allclose(buffer, expected, rtol=max(limits.eps, 1e-5), atol=limits.tiny * limits.eps)


def describe_adapters(adapters: dict[str, dict[str, Any]]) -> str:
    """Checksums of all together, whatever their names and order."""
    if not adapters:
        return NONE
    # Of several the coarsest decides
    together = Checksums({f"{name}/{key}": value for name, part in adapters.items() for key, value in part.items()})
    each = [Checksums(part).digests for part in adapters.values()]
    digests = {}
    for precision in together.digests:
        parts = sorted(part.get(precision, "") for part in each)
        digests[precision] = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    return " ".join(f"{name}:{digest}" for name, digest in digests.items())


def settings_fingerprint(config: Any) -> dict[str, str]:  # a VoCoLlamaConfig, its parts of whatever classes
    """The part of a fingerprint that is known without weights."""
    layers, heads, head_dim = key_value_shape(config.text_config)
    return {
        "version": VERSION,
        "text_model": config.text_config.model_type,
        "layers": str(layers),
        "key_value_heads": str(heads),
        "head_dim": str(head_dim),
        "voco_token_id": str(config.voco_token_id),
        "vision_prefix_token_ids": str(config.vision_prefix_token_ids),
        "vision_suffix_token_ids": str(config.vision_suffix_token_ids),
        "config": json.dumps(compression_settings(config), sort_keys=True, default=str),
    }


class ModelState:
    """
    What can be asked of a model at every question: which tensors it has, where they are, how often PyTorch has seen
    them written, which adapters are active, and its configuration.
    """

    def __init__(self, model: CompressingModel):
        modules: list[torch.nn.Module] = [model]  # type: ignore[list-item]  # a module, which a Protocol cannot say
        self.tensors: list[torch.Tensor] = []
        self.adapters: list[tuple] = []
        has_adapters = "peft.tuners.tuners_utils" in sys.modules
        for module in modules:  # which grows meanwhile; `named_parameters` takes longer than all else of a question
            if module._modules:
                modules += [child for child in module._modules.values() if child is not None]
            if module._parameters:
                self.tensors += [tensor for tensor in module._parameters.values() if tensor is not None]
            if module._buffers:
                self.tensors += [tensor for tensor in module._buffers.values() if tensor is not None]
            if has_adapters:
                self.adapters += adapter_state(module)
        self.places = [tensor.data_ptr() for tensor in self.tensors]
        self.versions = versions_of(self.tensors)
        self.config = model.config

    def key(self) -> tuple:
        """What is compared."""
        return self.places, self.versions, self.adapters, compression_settings(self.config), ids_of(self.config)


def ids_of(config: VoCoLlamaConfig) -> tuple:
    return config.voco_token_id, config.vision_prefix_token_ids, config.vision_suffix_token_ids


def adapter_state(module: Any) -> list[tuple]:  # any module; what is asked of a layer of PEFT only such a one has
    """Switches of a layer of PEFT."""
    if "_active_adapter" not in vars(module):
        return []
    scaling = dict(vars(module).get("scaling", {}))
    merged = list(module.merged_adapters)
    return [(list(module.active_adapters), module.disable_adapters, merged, scaling, is_tuner_layer(module))]


def versions_of(tensors: list[torch.Tensor]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # tensors of inference mode have none
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class FingerprintMemo:
    """
    The fingerprint of one model, kept while the model stays what it is.

    PyTorch counts what is written to a weight, but not what is written through `weight.data`. So the memory is checked
    too: all of it with `exact=True`; else what a question can afford, which is all of a model of up to 262,144 values,
    and of a larger one the embeddings of a segment's tokens and 64 KiB, others at every question. So it is seen at the
    latest when every 64 KiB have had their question, and sooner the more was written.
    """

    def __init__(self) -> None:
        self.fingerprint: Fingerprint | None = None

    def __reduce__(self) -> tuple:
        # A copy belongs to a model of its own
        return type(self), ()

    def get(self, model: CompressingModel, exact: bool) -> Fingerprint:
        """
        Args:
            model ([`VoCoLlamaModel`]): Always the same one.
            exact (`bool`): Whether to read all weights again.
        """
        state = ModelState(model)
        is_known = self.fingerprint is not None and state.key() == self._key
        if not is_known or not (self._is_unchanged(model) if exact else self._seems_unchanged(model, state)):
            self._compute(model, state)
        return Fingerprint(self.fingerprint or {})

    def _compute(self, model: CompressingModel, state: ModelState) -> None:
        found = EffectiveWeights(model)
        checksums = Checksums(found.values)
        self._own, self._own_digest = checksums.own, checksums.digests[checksums.own]
        self._watch(model, state, found, checksums)
        self._adapters, self._rotation = describe_adapters(found.adapters), describe_rotation(model)
        # Last, so that a failure leaves nothing half done
        self._key = copy.deepcopy(state.key())
        self.fingerprint = Fingerprint(
            {
                **settings_fingerprint(model.config),
                "rotation": self._rotation,
                "quantization": describe_quantization(model.config, found.packed),
                "weights": str(checksums) if found.is_complete else NONE,
                "adapters": self._adapters,
                ADAPTER_NAMES: ", ".join(sorted(found.names)) or NONE,
            }
        )

    def _is_unchanged(self, model: CompressingModel) -> bool:
        found = EffectiveWeights(model)
        checksums = Checksums(found.values, own_only=True)
        return (
            checksums.digests == {self._own: self._own_digest}
            and describe_adapters(found.adapters) == self._adapters
            and describe_rotation(model) == self._rotation
        )

    def _watch(
        self, model: CompressingModel, state: ModelState, found: EffectiveWeights, checksums: Checksums
    ) -> None:
        """Remembers what [`_seems_unchanged`] compares."""
        self._is_small = sum(tensor.numel() for tensor in state.tensors) <= SMALL_MODEL
        self._values, self._rows = {}, None
        if self._is_small:
            self._values = join_values(state.tensors)
            return
        if not model.get_input_embeddings().weight.is_meta:
            self._rows = found.values["embeddings"].clone()
        index = {id(tensor): place for place, tensor in enumerate(state.tensors)}
        blocks = [
            (index[id(tensor)], block, block_sum)
            for name, tensor in found.values.items()
            if isinstance(tensor, torch.Tensor) and id(tensor) in index and tensor.is_contiguous()
            for block, block_sum in enumerate(checksums.blocks.get(name, ()))
        ]
        self._blocks = np.random.default_rng(0).permutation(np.array(blocks, np.int64).reshape(-1, 3))
        self._turn = 0

    def _seems_unchanged(self, model: CompressingModel, state: ModelState) -> bool:
        if self._is_small:
            values = join_values(state.tensors)
            return all(torch.equal(values[kind], kept) for kind, kept in self._values.items())
        if self._rows is not None and not torch.equal(read_embeddings(model), self._rows):
            return False
        if len(self._blocks) == 0:
            return True
        place, block, block_sum = self._blocks[self._turn % len(self._blocks)].tolist()
        self._turn += 1
        return self._sum_of_block(state.tensors[place], block) == block_sum

    def _sum_of_block(self, tensor: torch.Tensor, block: int) -> int:
        dtype = getattr(torch, self._own) if tensor.is_floating_point() else tensor.dtype
        size = BLOCK_WORDS * 8 // dtype.itemsize
        return int(block_sums(tensor.detach().view(-1)[block * size : (block + 1) * size], dtype)[0])


def join_values(tensors: list[torch.Tensor]) -> dict[tuple[torch.dtype, torch.device], torch.Tensor]:
    """All values, together for each kind of tensor."""
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        if not tensor.is_meta:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach().reshape(-1))
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}


__all__ = ["Fingerprint", "check_fingerprint", "with_images"]
