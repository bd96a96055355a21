"""What a `<voco>` token needs: its row in vocabulary and weights, the tokens before it, and a chat template."""

import torch
from transformers import AddedToken, PreTrainedTokenizerBase, ProcessorMixin

from .checkpoint import EMBEDDING, LM_HEAD, Checkpoint


VOCO_TOKEN = "<voco>"
IMAGE_TOKEN = "<image>"
LLAMA_VOCAB_SIZE = 32000
LLAMA_NEWLINE_ID = 13


def place_voco_token(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, str]:
    """
    Finds the `<voco>` that a checkpoint was trained with, or gives it one: weights, vocabulary and tokenizer change
    in place.

    Returns:
        `tuple[int, str]`: the id, and where it came from.
    """
    place = _find_voco_token if checkpoint.has_voco_token else _make_voco_token
    return place(checkpoint, tokenizer)


def _add_voco_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<voco>` in a tokenizer, which has it as a special token afterwards."""
    tokenizer.add_tokens(AddedToken(VOCO_TOKEN, special=True, normalized=False))
    return tokenizer.get_vocab()[VOCO_TOKEN]


def _find_voco_token(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, str]:
    """The id of the `<voco>` that a checkpoint was trained with, and where it came from."""
    vocab_size = checkpoint.text_config.vocab_size
    if tokenizer is not None and VOCO_TOKEN in tokenizer.get_vocab():
        voco_token_id = _add_voco_token(tokenizer)
        if voco_token_id >= vocab_size:
            raise ValueError(
                f"<voco> is token {voco_token_id} of the tokenizer, but the checkpoint has {vocab_size} tokens; "
                "the tokenizer does not belong to it"
            )
        return voco_token_id, "the tokenizer"
    if vocab_size != LLAMA_VOCAB_SIZE + 1:
        raise ValueError(
            f"{checkpoint.source} has vocab_size {vocab_size} and no tokenizer that knows <voco>; "
            f"{LLAMA_VOCAB_SIZE + 1} was expected, Llama's {LLAMA_VOCAB_SIZE} tokens and <voco>"
        )
    if tokenizer is not None and (voco_token_id := _add_voco_token(tokenizer)) != LLAMA_VOCAB_SIZE:
        raise ValueError(
            f"<voco> is token {LLAMA_VOCAB_SIZE} of the checkpoint, but would be {voco_token_id} of the tokenizer; "
            "the tokenizer does not belong to it"
        )
    return LLAMA_VOCAB_SIZE, "the last row of the vocabulary"


def _make_voco_token(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, str]:
    """Gives a checkpoint its `<voco>`. Returns the id, and where it came from."""
    vocab_size = checkpoint.text_config.vocab_size
    if tokenizer is None:
        voco_token_id, known = vocab_size, False
    else:
        known = VOCO_TOKEN in tokenizer.get_vocab()
        voco_token_id = _add_voco_token(tokenizer)
    if voco_token_id > vocab_size:
        raise ValueError(
            f"<voco> would be token {voco_token_id} of the tokenizer, but the checkpoint has {vocab_size} tokens; "
            "the tokenizer does not belong to it"
        )
    if known and voco_token_id < vocab_size:
        return voco_token_id, "the tokenizer"
    for name in (EMBEDDING, LM_HEAD):
        # A checkpoint with tied embeddings has no lm_head of its own
        if name in checkpoint.state_dict:
            weight = checkpoint.state_dict[name]
            mean = weight[:voco_token_id].mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
            checkpoint.state_dict[name] = torch.cat([weight[:voco_token_id], mean, weight[voco_token_id + 1 :]])
    if voco_token_id < vocab_size:
        return voco_token_id, "a free row of the padded vocabulary"
    checkpoint.text_config.vocab_size = vocab_size + 1
    return voco_token_id, "a row added to the vocabulary"


def vision_prefix(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The BOS token, if the language model has one."""
    bos_token_id = checkpoint.text_config.bos_token_id if tokenizer is None else tokenizer.bos_token_id
    return [] if bos_token_id is None else [bos_token_id]


def vision_suffix(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None, voco_token_id: int) -> list[int]:
    """The newline between image and VoCo tokens."""
    if tokenizer is None:
        checkpoint.warnings.append(
            f"without a tokenizer vision_suffix_token_ids is [{LLAMA_NEWLINE_ID}], the newline of Llama; "
            "pass tokenizer or vision_suffix_token_ids if the model has another"
        )
        return [LLAMA_NEWLINE_ID]
    ids = tokenizer.encode(f"\n{VOCO_TOKEN}", add_special_tokens=False)
    suffix = ids[: ids.index(voco_token_id)]
    if not suffix:
        checkpoint.warnings.append("the tokenizer drops newlines: vision_suffix_token_ids is empty")
    return suffix


def chat_template(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str] | None:
    """The chat template of the checkpoint or of its tokenizer, with `<image>` where an image goes."""
    processor, _ = ProcessorMixin.get_processor_dict(checkpoint.source)
    template = processor.get("chat_template") or tokenizer.chat_template or checkpoint.chat_template
    image_token = processor.get("image_token", IMAGE_TOKEN)
    if isinstance(template, dict):
        return {name: text.replace(image_token, IMAGE_TOKEN) for name, text in template.items()}
    return template and template.replace(image_token, IMAGE_TOKEN)
