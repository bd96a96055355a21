"""The embedding of `<voco>` is trained along with adapters, whatever their configuration calls it."""

from __future__ import annotations

import copy
import warnings

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PreTrainedModel


def with_voco_embedding(peft_config: PeftConfig, model: PreTrainedModel) -> PeftConfig:
    """A copy that trains the embedding of `<voco>` too, unless the embeddings are trained anyway."""
    peft_config = copy.deepcopy(peft_config)
    embedding = module_name(model, model.get_input_embeddings())
    if not isinstance(peft_config, LoraConfig) or trains_module(peft_config, embedding):
        return peft_config
    short_name = embedding.rsplit(".", 1)[-1]
    indices = peft_config.trainable_token_indices or {}
    if isinstance(indices, list):
        indices = {short_name: indices}
    # PEFT takes the first entry that fits a module and leaves the others: all of the embedding become one
    others = {name: rows for name, rows in indices.items() if not embedding.endswith(name)}
    own = [row for name, rows in indices.items() if name not in others for row in rows]
    own = list(dict.fromkeys([*own, model.config.voco_token_id]))
    if model.config.get_text_config().tie_word_embeddings:
        # One weight under two names has the same rows trained
        head = module_name(model, model.get_output_embeddings())
        others = {name: own if head.endswith(name) else rows for name, rows in others.items()}
    peft_config.trainable_token_indices = {short_name: own, **others}
    return peft_config


def module_name(model: torch.nn.Module, module: torch.nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def trains_module(peft_config: LoraConfig, name: str) -> bool:
    """Whether PEFT trains the module called `name` in the model as a whole, or puts an adapter on it."""
    if any(name.endswith(saved) for saved in peft_config.modules_to_save or ()):
        return True
    if any(f"{name}.weight".endswith(target) for target in peft_config.target_parameters or ()):
        return True
    return peft_config.target_modules is not None and bool(check_target_module_exists(peft_config, name))


def warn_if_voco_is_not_trained(model: PeftModel) -> None:
    """Says so if the loss has no gradient to the embedding of `<voco>`."""
    if model.device.type == "meta":
        return
    base = model.get_base_model()
    embedding = base.get_input_embeddings()
    parameters = [parameter for parameter in embedding.parameters() if parameter.requires_grad]
    ids = torch.tensor([[base.config.voco_token_id]], device=model.device)
    with torch.enable_grad():
        row = embedding(ids)
        # An adapter may start with zeros in one of its two matrices
        gradients = (
            torch.autograd.grad(row.float().square().sum() + row.float().sum(), parameters, allow_unused=True)
            if parameters and row.requires_grad
            else []
        )
    if not any(gradient is not None and gradient.any() for gradient in gradients):
        warnings.warn(
            "the embedding of <voco> is not trained, and images are compressed by it: train it with "
            f"trainable_token_indices={{'embed_tokens': [{base.config.voco_token_id}]}}, or its whole layer with "
            "modules_to_save=['embed_tokens']",
            UserWarning,
            stacklevel=2,
        )
