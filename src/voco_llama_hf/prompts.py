"""Questions about images and videos as a model was trained to be asked."""

from collections.abc import Sequence

from .modeling import VoCoLlamaProcessor


def check_question(question: str, processor: VoCoLlamaProcessor) -> None:
    """
    Raises:
        ValueError: if a question is empty, or holds a token that stands for an image.
    """
    if not question.strip():
        raise ValueError("the question is empty")
    for token in (processor.image_token, processor.video_token, processor.voco_token):
        if token in question:
            raise ValueError(f"the question has {token} in it: images are put before the question")


def build_prompt(processor: VoCoLlamaProcessor, kinds: Sequence[str], question: str) -> str:
    """
    A question behind its images and videos, as the chat template has it.

    Args:
        processor ([`VoCoLlamaProcessor`]): Whose tokens and template are used.
        kinds (`Sequence[str]`): `"image"` or `"video"` for each.
        question (`str`): The question, see [`check_question`].
    """
    if processor.chat_template is None:
        tokens = {"image": processor.image_token, "video": processor.video_token}
        return "".join(f"{tokens[kind]}\n" for kind in kinds) + question
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
    conversation: list[dict] = [{"role": "user", "content": content}]
    return processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)


def starts_with_bos(prompt: str, processor: VoCoLlamaProcessor) -> bool:
    """Whether a template has written the BOS token, which must not be added again."""
    bos = processor.tokenizer.bos_token
    return bos is not None and prompt.startswith(bos)


__all__ = ["build_prompt", "check_question", "starts_with_bos"]
