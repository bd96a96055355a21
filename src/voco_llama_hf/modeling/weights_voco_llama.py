"""Every value of a model that compressed keys depend on, wherever it lives, and a checksum over all of them."""

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch


BLOCK_WORDS = 8_192  # of 8 bytes, that share a sum
STEP_WORDS = {"cpu": 2**14}  # worked on at a time: what fits into the caches of a processor
ACCELERATOR_STEP_WORDS = 2**23
# Precisions from coarse to fine, and those that a model in each is also known by: see [`Checksums`]
KNOWN_BY: dict[str, tuple[str, ...]] = {
    "bfloat16": ("bfloat16", "float16"),
    "float16": ("float16", "bfloat16"),
    "float32": ("float32", "float16", "bfloat16"),
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# What the last layer does with its keys and values, and behind it
LAST_LAYER_LEFT_OUT = ("mlp", "post_attention_layernorm", "self_attn.q_proj", "self_attn.q_norm", "self_attn.o_proj")
PLAIN = (str, int, float, bool, bytes, torch.dtype, type(None))


class CompressingModel(Protocol):
    """What is asked of a [`VoCoLlamaModel`], which is a module besides."""

    config: Any  # a VoCoLlamaConfig, whose parts are of whatever classes they name
    language_model: Any  # of whatever class the configuration names
    embed_ids: Callable[[list[int]], torch.Tensor]
    get_input_embeddings: Callable[[], torch.nn.Module]


@dataclass(frozen=True)
class Offloaded:
    """A tensor that is kept elsewhere until its module runs."""

    weights: Mapping
    key: str
    dtype: torch.dtype

    def load(self) -> torch.Tensor:
        return self.weights[self.key].to(self.dtype)


class EffectiveWeights:
    """
    The values that compressed keys depend on, under names that do not tell how they got there: what is offloaded is
    found where it is, and an adapter's copy of a module stands in place of the module.

    Args:
        model ([`VoCoLlamaModel`]): Model to look through.

    Attributes:
        values (`dict[str, Any]`):
            Tensors of the model: parameters, buffers, what quantized modules pack; some are [`Offloaded`].
        adapters (`dict[str, dict[str, Any]]`):
            Tensors and settings of the adapters that are active and not merged into weights.
        packed (`set[str]`):
            Classes of what is no plain tensor of floats.
        is_complete (`bool`):
            False if some weights are nowhere, as on the meta device.
    """

    def __init__(self, model: CompressingModel):
        self.values: dict[str, Any] = {}
        self.adapters: dict[str, dict[str, Any]] = {}
        self.names: set[str] = set()
        self.packed: set[str] = set()
        self.is_complete = True
        last = f"language_model.layers.{model.config.text_config.num_hidden_layers - 1}"
        self._left_out = {"language_model.norm", *(f"{last}.{name}" for name in LAST_LAYER_LEFT_OUT)}
        # Of the embeddings only some rows are read, and the rotation is compared with the configuration
        self._embedding, self._rotation = model.get_input_embeddings(), model.language_model.rotary_emb
        self._visit(model, "", [])  # type: ignore[arg-type]
        self._add("embeddings", read_embeddings(model))

    def _visit(self, module: torch.nn.Module, name: str, maps: list[tuple[Mapping, str]]) -> None:
        """`maps` are weights that are kept elsewhere, each with the way from whom they belong to."""
        if name in self._left_out or module is self._embedding or module is self._rotation:
            return
        maps = [*maps, *((weights, "") for weights in offloaded_weights(module))]
        if is_tuner_layer(module):
            self._visit_adapters(module, name, maps)
            return self._visit_child(module, "base_layer", name, maps)
        if is_wrapper_to_save(module):
            active = active_copy(module)
            if active is None:
                return self._visit_child(module, "original_module", name, maps)
            self.names.add(active)
            return self._visit_child(module, f"modules_to_save.{active}", name, maps)
        kept = own_state(module)
        for key, value in kept.items():
            self._add(f"{name}.{key}", self._locate(value, key, maps))
        if is_packed(kept):
            self.packed.add(type(module).__name__)
        for key, buffer in module.named_buffers(recurse=False):
            if key not in kept:
                # Made from the configuration, on whatever device, and so not to the last digit
                is_rounded = buffer.dtype in FLOATS and not buffer.is_meta
                self._add(f"{name}.{key}", buffer.to(torch.bfloat16).view(torch.int16) if is_rounded else buffer)
        for key, _ in module.named_children():
            self._visit_child(module, key, f"{name}.{key}".removeprefix("."), maps)

    def _visit_child(self, module: torch.nn.Module, key: str, name: str, maps: list[tuple[Mapping, str]]) -> None:
        self._visit(module.get_submodule(key), name, [(weights, f"{way}{key}.") for weights, way in maps])

    def _visit_adapters(self, layer: Any, name: str, maps: list[tuple[Mapping, str]]) -> None:
        # A `BaseTunerLayer` of PEFT, which need not be installed
        if layer.disable_adapters or layer.merged:
            return
        for adapter in layer.active_adapters:
            found: dict[str, Any] = {}
            for kind in layer.adapter_layer_names:
                holder = getattr(layer, kind)
                if not hasattr(holder, "keys") or adapter not in holder.keys():  # noqa: SIM118
                    continue
                part, own = holder[adapter], [(weights, f"{way}{kind}.{adapter}.") for weights, way in maps]
                tensors: dict[str, Any] = {"": part}
                if isinstance(part, torch.nn.Module):
                    tensors = own_state(part)
                    own += [(weights, "") for weights in offloaded_weights(part)]
                found |= {f"{name}.{kind}.{key}": self._locate(value, key, own) for key, value in tensors.items()}
            if found:
                scaling = vars(layer).get("scaling", {})
                found[f"{name}.scaling"] = scaling.get(adapter)
                self.adapters.setdefault(adapter, {}).update(found)
                self.names.add(adapter)

    def _locate(self, value: object, key: str, maps: list[tuple[Mapping, str]]) -> object:
        if not isinstance(value, torch.Tensor) or not value.is_meta:
            return value
        for weights, way in reversed(maps):
            place = f"{way}{key}".removesuffix(".")
            if place in weights.keys():  # noqa: SIM118
                return Offloaded(weights, place, value.dtype)
        self.is_complete = False
        return value

    def _add(self, name: str, value: object) -> None:
        if isinstance(value, torch.Tensor) and value.is_meta:
            self.is_complete = False
        self.values[name.removeprefix(".")] = value


def own_state(module: torch.nn.Module) -> dict[str, Any]:
    """What a module saves of itself, without its children: also what quantized ones keep beside their parameters."""
    if next(module.children(), None) is None:
        return dict(module.state_dict(keep_vars=True))
    own: dict[str, Any] = {}
    # What modules override to save what they pack, and the only way to ask for it without their children
    module._save_to_state_dict(own, "", True)
    return own


def is_packed(kept: dict[str, Any]) -> bool:
    """Whether a module's weights are anything but plain tensors of floats."""
    plain = torch.Tensor, torch.nn.Parameter
    return any(type(value) not in plain or value.dtype not in FLOATS for value in kept.values())


def offloaded_weights(module: torch.nn.Module) -> Iterator[Mapping]:
    """Where accelerate keeps the weights of a module that is offloaded."""
    hook = vars(module).get("_hf_hook")  # the one place that says where they are
    for part in vars(hook).get("hooks", [hook]) if hook is not None else []:
        weights = vars(part).get("weights_map")
        if weights is not None:
            # Its own keys start with the module's name, which the module's tensors lack
            yield LocalNames(weights.dataset, weights.prefix) if hasattr(weights, "prefix") else weights


class LocalNames(Mapping):
    """Part of a mapping, under names without their prefix."""

    def __init__(self, weights: Mapping, prefix: str):
        self.weights, self.prefix = weights, prefix

    def __getitem__(self, name: str) -> Any:
        return self.weights[self.prefix + name]

    def __contains__(self, name: object) -> bool:
        return any(name == key for key in self)

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self.prefix) for key in self.weights if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _peft_class(module_name: str, class_name: str) -> Any:
    """A class of PEFT; where PEFT was never imported nothing is of it."""
    module = sys.modules.get(module_name)
    return () if module is None else getattr(module, class_name)


def is_tuner_layer(module: torch.nn.Module) -> bool:
    return isinstance(module, _peft_class("peft.tuners.tuners_utils", "BaseTunerLayer"))


def is_wrapper_to_save(module: torch.nn.Module) -> bool:
    return isinstance(module, _peft_class("peft.utils.other", "ModulesToSaveWrapper"))


def active_copy(wrapper: Any) -> str | None:  # a `ModulesToSaveWrapper` of PEFT, which need not be installed
    """The adapter whose copy of a module is run in its place, if any is."""
    active = wrapper.active_adapters
    known = active and all(adapter in wrapper.modules_to_save for adapter in active)
    return active[0] if known and not wrapper.disable_adapters else None


@torch.no_grad()
def read_embeddings(model: CompressingModel) -> torch.Tensor:
    """Embeddings of the tokens of a segment, through whatever wraps them, offloads them or adds to them."""
    config = model.config
    return model.embed_ids([*config.vision_prefix_token_ids, *config.vision_suffix_token_ids, config.voco_token_id])


class Checksums:
    """
    SHA-256 over names, shapes and all values. A value that is a float counts rounded: a model has one checksum for its
    own precision, the coarsest of its tensors, and others for what a copy of it in other precisions would hold.

    Whatever single value changes, the sums that are hashed change. They are linear, so values could be made up on
    purpose that have the same.

    Args:
        values (`dict[str, Any]`):
            What to go through.
        own_only (`bool`, *optional*, defaults to `False`):
            Whether to stop at the model's own precision.
    """

    def __init__(self, values: dict[str, Any], own_only: bool = False):
        self.own = own_precision(values)
        self.blocks: dict[str, np.ndarray] = {}
        names = KNOWN_BY[self.own][:1] if own_only else KNOWN_BY[self.own]
        self._hashes = {name: hashlib.sha256() for name in names}
        for name in sorted(values):
            self._add(name, values[name])
        self.digests = {name: sha256.hexdigest()[:32] for name, sha256 in self._hashes.items()}

    def _say(self, text: str) -> None:
        for sha256 in self._hashes.values():
            sha256.update(f"{text};".encode())

    def _add(self, name: str, value: object) -> None:
        if isinstance(value, Offloaded):
            self._add_tensor(name, value.load())
        elif isinstance(value, PLAIN):
            self._say(f"{name}={value!r}")
        elif isinstance(value, Mapping):
            for key in value:
                self._add(f"{name}.{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for index, part in enumerate(value):
                self._add(f"{name}.{index}", part)
        elif isinstance(value, torch.Tensor):
            self._add_tensor(name, value.detach())
        else:
            self._say(f"{name}={type(value).__name__}")

    def _add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            # Made of several tensors, as those of torchao and quanto are
            parts, context = tensor.__tensor_flatten__()
            self._add(name, {part: getattr(tensor, part) for part in parts})
            self._say(f"{name}={context}")
        elif tensor.is_quantized:
            self._add(name, unpack(tensor))
        elif tensor.is_meta:
            self._say(f"{name} is nowhere")
        else:
            self._say(f"{name}{tuple(tensor.shape)}")
            for precision, sha256 in self._hashes.items():
                dtype = getattr(torch, precision) if tensor.dtype in FLOATS else tensor.dtype
                sums = block_sums(tensor, dtype)
                sha256.update(sums.tobytes())
                if precision == self.own:
                    self.blocks[name] = sums

    def __str__(self) -> str:
        return " ".join(f"{name}:{digest}" for name, digest in self.digests.items())


def own_precision(values: dict[str, Any]) -> str:
    """The coarsest precision of floats."""
    found = {value.dtype for value in values.values() if isinstance(value, (torch.Tensor, Offloaded))}
    return next((name for name in KNOWN_BY if getattr(torch, name) in found), "float32")


def unpack(tensor: torch.Tensor) -> list[Any]:
    """Integers, scales and zero points of a quantized tensor."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.int_repr(), tensor.q_scale(), tensor.q_zero_point()]
    return [tensor.int_repr(), tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]


def block_sums(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """
    A sum over each block of a tensor, on its device and at the speed of its memory: of words of 8 bytes, each times an
    odd number of its place.

    Args:
        tensor (`torch.Tensor`): Values.
        dtype (`torch.dtype`): What to round them to first.

    Returns:
        `np.ndarray` of int64.
    """
    flat, size = tensor.reshape(-1), tensor.numel()
    if size == 0:
        return np.empty(0, np.int64)
    step = STEP_WORDS.get(flat.device.type, ACCELERATOR_STEP_WORDS) * 8 // dtype.itemsize
    words = Words(flat, dtype, min(step, size))
    sums = []
    for start in range(0, size, step):
        sums += words.sums(flat[start : start + step] if size > step else flat, min(step, size - start))
    return (sums[0] if len(sums) == 1 else torch.cat(sums)).cpu().numpy()


class Words:
    """
    Values as words of 8 bytes, the last one filled up with zeros; rounded and copied only where that is needed.

    Args:
        flat (`torch.Tensor`): All of the values.
        dtype (`torch.dtype`): What to round them to.
        length (`int`): As many as are worked on at a time.
    """

    def __init__(self, flat: torch.Tensor, dtype: torch.dtype, length: int):
        self.itemsize = dtype.itemsize
        size = -(-length * self.itemsize // 8)
        self.scratch = flat.new_empty(size, dtype=torch.int64)
        self.factors = place_factors(flat.device)
        is_aligned = flat.storage_offset() * self.itemsize % 8 == 0 and length * self.itemsize % 8 == 0
        self.is_plain = flat.dtype == dtype and is_aligned and not flat.is_conj()
        self.rounded = None if self.is_plain else flat.new_zeros(size * 8 // self.itemsize, dtype=dtype)
        # The processor converts between the 16-bit formats slowly
        is_slow = flat.dtype == torch.bfloat16 and dtype == torch.float16
        self.between = flat.new_empty(length, dtype=torch.float32) if is_slow else None

    def sums(self, part: torch.Tensor, length: int) -> list[torch.Tensor]:
        """Sums of the blocks of a part."""
        words = self._read(part, length)
        size = words.numel()
        # The upper half is added to the lower, so that all bits of a word reach all of a product
        mixed = torch.bitwise_right_shift(words, 32, out=self.scratch[:size]).add_(words)
        if size <= BLOCK_WORDS:
            return [mixed.mul_(self.factors[:size]).sum(0, keepdim=True)]
        whole = size // BLOCK_WORDS * BLOCK_WORDS
        sums = [mixed[:whole].view(-1, BLOCK_WORDS).mul_(self.factors).sum(1)]
        if whole < size:
            sums.append(mixed[whole:].mul_(self.factors[: size - whole]).sum(0, keepdim=True))
        return sums

    def _read(self, part: torch.Tensor, length: int) -> torch.Tensor:
        missing = -length * self.itemsize % 8 // self.itemsize
        if self.rounded is None and missing == 0:
            return part.view(torch.int64)
        if self.rounded is None:
            return torch.cat([part, part.new_zeros(missing)]).view(torch.int64)
        if self.between is not None:
            part = self.between[:length].copy_(part)
        self.rounded[:length].copy_(part)
        self.rounded[length : length + missing].zero_()
        return self.rounded[: length + missing].view(torch.int64)


@lru_cache(maxsize=16)
def place_factors(device: torch.device) -> torch.Tensor:
    """Odd pseudo-random numbers, one a place of a block (SplitMix64)."""
    with np.errstate(over="ignore"):
        mixed = np.arange(1, BLOCK_WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    odd = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(odd.view(np.int64).copy()).to(device)
