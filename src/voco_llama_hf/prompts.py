"""Questions about images and videos as a model was trained to be asked."""

from collections.abc import Sequence

from .modeling import VoCoLlamaProcessor


PIECE = 65_536  # characters that are tokenized at a time where a prompt may be too long
CUT_TOKENS = 16  # that a cut through a text may add to it
MAX_ERROR = 200  # characters of what a template says
WINDOW = "this model reads at most {} with the answer"


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
    return render([{"role": "user", "content": content}], processor)


def render(conversation: list[dict], processor: VoCoLlamaProcessor) -> str:
    """
    A conversation as the chat template has it, up to where the answer begins.

    Raises:
        ValueError: if the template fails.
    """
    try:
        return processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except ValueError:
        raise
    except Exception as error:  # a template is a program that came with the checkpoint, and fails as it likes
        reason = f"{type(error).__name__}: {error}"[:MAX_ERROR]
        raise ValueError(f"the chat template of this model fails: {reason}") from error


def check_text_length(prompt: str, processor: VoCoLlamaProcessor, window: int) -> None:
    """
    Turns away a prompt that is surely too long, and reads no more of it than it takes to know: the processor would
    tokenize all of it.

    Raises:
        ValueError: if it has more tokens than the model reads.
    """
    if len(prompt) <= PIECE:
        return
    num_tokens = 0
    for start in range(0, len(prompt), PIECE):
        ids = processor.tokenizer(prompt[start : start + PIECE], add_special_tokens=False).input_ids
        num_tokens += len(ids) - CUT_TOKENS
        if num_tokens >= window:
            raise ValueError(f"the prompt has more than {num_tokens} tokens, but {WINDOW.format(window)}")


def check_num_tokens(num_tokens: int, window: int) -> None:
    """
    Raises:
        ValueError: if a prompt leaves no room for an answer.
    """
    if num_tokens >= window:
        raise ValueError(f"the prompt has {num_tokens} tokens, but {WINDOW.format(window)}")


def starts_with_bos(prompt: str, processor: VoCoLlamaProcessor) -> bool:
    """Whether a template has written the BOS token, which must not be added again."""
    bos = processor.tokenizer.bos_token
    return bos is not None and prompt.startswith(bos)


__all__ = ["build_prompt", "check_num_tokens", "check_question", "check_text_length", "render", "starts_with_bos"]
