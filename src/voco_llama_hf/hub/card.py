"""The model card of a VoCo-LLaMA: written once, and refreshed without touching what a person wrote."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME

from ..files import check_inside, written_aside
from ..loading import find_base, is_adapter_folder, is_hub_id, load_config, load_processor
from ..modeling import VoCoLlamaConfig, VoCoLlamaProcessor
from ..modeling.compat_voco_llama import NEWEST_TESTED, OLDEST
from ..pictures import choose_number
from ..prompts import starts_with_bos
from .cost import CostModel, ImageCost
from .metadata import check_base_model, check_license
from .results import TASK, load_eval_results, merge_eval_results, results_tables


TEMPLATE = Path(__file__).with_name("model_card.md")
PICTURE = Path(__file__).with_name("attention.png")
RESULTS_FILE = "results.json"
CODE_FILE = "modeling_voco_llama.py"
TAGS = ["voco-llama", "vision-language", "token-compression"]
BASE_PLACEHOLDER = "path/to/the-base-model"
# Of the template that PEFT and huggingface_hub write, whoever trained
UNFILLED = "[More Information Needed]"
TOKEN_COUNTS = (1, 2, 8)
NUM_TEXT_TOKENS = 32
SECTION = re.compile(r"<!-- voco-llama:(?P<name>[\w-]+) -->.*?<!-- /voco-llama:(?P=name) -->", re.DOTALL)
MARKER = re.compile(r"<!-- /?voco-llama:[\w-]+ -->")

DESCRIPTION = "A vision-language model that answers questions about images and videos."
LIMITS = """\
- What k tokens cannot hold is lost: small text, many objects and exact places suffer first. Take a larger k for them.
- A compressed image cannot be turned back into pixels, and can be read by this model alone.
- Like any language model it can state what is not in the image."""


def make_card(
    config: VoCoLlamaConfig,
    processor: VoCoLlamaProcessor,
    model_id: str,
    card: ModelCard | None = None,
    *,
    name: str | None = None,
    ships_code: bool = True,
    is_adapter: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    base_model_relation: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    language: str | None = None,
    eval_results: Sequence[EvalResult] = (),
    training: str | None = None,
    description: str = DESCRIPTION,
    results_text: str | None = None,
    training_text: str | None = None,
    limits: str = LIMITS,
) -> ModelCard:
    """
    A model card, new or refreshed.

    Args:
        config ([`VoCoLlamaConfig`]):
            Configuration of the model.
        processor ([`VoCoLlamaProcessor`]):
            Its processor.
        model_id (`str`):
            Hub id or folder that the quick start loads from.
        card ([`~huggingface_hub.ModelCard`], *optional*):
            Card to refresh. Sections between our markers are written anew, all other text stays; metadata are merged,
            and what it says of licence, base model, task and library stays unless it is passed here.
        name (`str`, *optional*):
            Title of a new card; the last part of `model_id` by default.
        ships_code (`bool`, *optional*, defaults to `True`):
            Whether the code lies next to the weights.
        is_adapter (`bool`, *optional*, defaults to `False`):
            Whether it is PEFT adapters, which the quick start puts on their base model.
        license, base_model, base_model_relation, language (`str`, *optional*):
            Metadata. The relation is `"finetune"`, `"adapter"`, `"quantized"` or `"merge"`.
        datasets, tags (`Sequence[str]`, *optional*):
            Metadata, added to those that the card has.
        eval_results (`Sequence[EvalResult]`, *optional*):
            Figures, in the place of those of the same metric and settings that the card has.
        training (`str`, *optional*):
            Markdown of the training section; by default it stays as it is.
        description, results_text, training_text, limits (`str`, *optional*):
            Markdown of a new card, which is a person's from then on.

    Returns:
        [`~huggingface_hub.ModelCard`]

    Raises:
        ValueError: if a section of `card` is opened and not closed, or the Hub would not take licence or base model.
    """
    if license is not None:
        check_license(license)
    if base_model is not None:
        check_base_model(base_model)
    if card is not None and is_untouched_template(card):
        card = None
    given = {
        "license": license,
        "base_model": base_model,
        "base_model_relation": base_model_relation or ("adapter" if is_adapter else None),
        "library_name": "peft" if is_adapter else None,
        "language": language,
    }
    name = name or Path(model_id).name
    data = merge_metadata(None if card is None else card.data, given, datasets, tags, eval_results, name)
    cost = CostModel(config)
    size = config.vision_config.image_size  # type: ignore[union-attr]
    number, per_tile = choose_number(processor)
    rendered = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        model_id=model_id,
        ships_code=ships_code,
        oldest_transformers="{}.{}".format(*OLDEST),
        newest_transformers="{}.{}".format(*NEWEST_TESTED),
        adapted=next(iter(as_list(data.base_model)), BASE_PLACEHOLDER) if is_adapter else None,
        description=description,
        image_size=size,
        ellipse=", ".join(str(round(size * edge)) for edge in (0.3, 0.3, 0.7, 0.7)),
        has_chat_template=processor.chat_template is not None,
        writes_bos=writes_bos(processor),
        num_voco_tokens=number,
        per_tile=per_tile,
        cost=cost,
        cost_rows=cost_rows(cost, sorted({*TOKEN_COUNTS, config.num_voco_tokens})),
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        num_text_tokens=NUM_TEXT_TOKENS,
        tables=results_tables(data.eval_results or []),
        results_text=results_text,
        training=training,
        training_text=training_text,
        limits=limits,
    )
    if card is None:
        return rendered
    rendered.text = merge_sections(card.text, rendered.text)
    return rendered


def write_card(
    folder: Path,
    model_id: str | None = None,
    results: Path | None = None,
    eval_results: Sequence[EvalResult] = (),
    **options: Any,
) -> Path:
    """
    Writes or refreshes the card of a saved model, with its picture beside it.

    Args:
        folder (`Path`):
            Model folder.
        model_id (`str`, *optional*):
            What the quick start loads; by default the name of the folder.
        results (`Path`, *optional*):
            Results of `voco-llama evaluate --output`; by default the folder's `results.json`, if there is one.
        eval_results (`Sequence[EvalResult]`, *optional*):
            Further figures.
        options:
            Further arguments of [`make_card`].

    Returns:
        `Path`: The card.
    """
    card = folder_card(folder, model_id, results, eval_results, **options)
    return save_card(card, folder)


def save_card(card: ModelCard, folder: Path) -> Path:
    """Writes a card and its picture into a folder."""
    if not os.path.lexists(folder / PICTURE.name):
        with written_aside(folder / PICTURE.name) as aside:
            shutil.copyfile(PICTURE, aside)
    path = folder / REPOCARD_NAME
    with written_aside(path) as aside:
        card.save(aside)
    return path


def folder_card(
    folder: Path,
    model_id: str | None = None,
    results: Path | None = None,
    eval_results: Sequence[EvalResult] = (),
    **options: Any,
) -> ModelCard:
    """What [`write_card`] writes."""
    path, own_results = folder / REPOCARD_NAME, folder / RESULTS_FILE
    for own in (path, own_results):
        check_inside(folder, own)
    figures = list(eval_results)
    if results is not None or own_results.is_file():
        figures += load_eval_results(results or own_results)
    name = folder.absolute().name
    options = {"ships_code": (folder / CODE_FILE).is_file(), "name": name, **options}
    if is_adapter_folder(folder):
        base_model = options.get("base_model") or hub_base(folder)
        options |= {"is_adapter": True, "ships_code": False, "base_model": base_model}
    return make_card(
        load_config(str(folder)),
        load_processor(str(folder)),
        model_id or name,
        ModelCard.load(path) if path.is_file() else None,
        eval_results=figures,
        **options,
    )


def hub_base(folder: Path) -> str | None:
    """The base model of adapters, if it lies on the Hub."""
    base = find_base(str(folder))
    return None if os.path.isdir(base.name) else base.name  # type: ignore[union-attr]


def is_untouched_template(card: ModelCard) -> bool:
    """Whether a card is the template of huggingface_hub, which PEFT writes, with nothing that a person filled in."""
    template = ModelCard.from_template(ModelCardData())
    return UNFILLED in card.text and card.text.count(UNFILLED) == template.text.count(UNFILLED)


def merge_metadata(
    old: CardData | None,
    given: dict[str, str | None],
    datasets: Sequence[str],
    tags: Sequence[str],
    eval_results: Sequence[EvalResult],
    name: str,
) -> ModelCardData:
    """Metadata of a card: what is given, then what it says already, then what every VoCo-LLaMA has."""
    fields: dict[str, Any] = {} if old is None else dict(vars(old))
    fields |= {key: value for key, value in given.items() if value is not None}
    fields["library_name"] = fields.get("library_name") or "transformers"
    fields["pipeline_tag"] = fields.get("pipeline_tag") or TASK
    fields["tags"] = list(dict.fromkeys([*as_list(fields.get("tags")), *TAGS, *tags]))
    fields["datasets"] = list(dict.fromkeys([*as_list(fields.get("datasets")), *datasets])) or None
    # A path tells of the machine, and the Hub does not take it
    bases = [name for name in as_list(fields.get("base_model")) if is_hub_id(name)]
    fields["base_model"] = bases if len(bases) > 1 else next(iter(bases), None)
    if bases:
        fields["base_model_relation"] = fields.get("base_model_relation") or "finetune"
    fields["eval_results"] = merge_eval_results(fields.get("eval_results") or [], eval_results)
    fields["model_name"] = fields.get("model_name") or name
    return ModelCardData(**fields)


def as_list(value: str | list[str] | None) -> list[str]:
    """Metadata may be one value or several."""
    return [value] if isinstance(value, str) else list(value or [])


def merge_sections(old: str, new: str) -> str:
    """
    The text of a card with its marked sections written anew. One that it lacks is put behind the one that comes before
    it in `new`, or at the end, under its heading.

    Raises:
        ValueError: if a section of `old` is opened and not closed, or the other way round.
    """
    sections = {match["name"]: match for match in SECTION.finditer(new)}
    stray = MARKER.findall(SECTION.sub("", old))
    if stray:
        raise ValueError(f"the card has {stray[0]} without its counterpart: put it back, or remove both")
    previous = None
    for name, match in sections.items():
        found = next((other for other in SECTION.finditer(old) if other["name"] == name), None)
        if found is not None:
            start, end, text = *found.span(), match[0]
        else:
            heading = new[: match.start()].rstrip().rsplit("\n", 1)[-1]
            behind = [other.end() for other in SECTION.finditer(old) if other["name"] == previous]
            start = end = behind[0] if behind else len(old.rstrip())
            text = f"\n\n{heading}\n\n{match[0]}"
        old = old[:start] + text + old[end:]
        previous = name
    return old


def cost_rows(cost: CostModel, token_counts: Sequence[int]) -> list[list[str]]:
    """Rows of the table of memory and computation."""
    costs = {f"k = {k}": cost.compressed(k, NUM_TEXT_TOKENS) for k in token_counts}
    costs["uncompressed"] = cost.uncompressed(NUM_TEXT_TOKENS)
    return [[reading, *format_cost(row)] for reading, row in costs.items()]


def format_cost(cost: ImageCost) -> list[str]:
    return [
        f"{cost.positions:,}",
        scaled(cost.nbytes, ("B", "kB", "MB", "GB")),
        scaled(cost.image_flops, ("", "k", "M", "G", "T", "P")),
        scaled(cost.question_flops, ("", "k", "M", "G", "T", "P")),
    ]


def scaled(number: float, units: Sequence[str]) -> str:
    """Three digits and a unit: 302120960 B -> `302 MB`."""
    step = 0
    while number >= 999.5 and step < len(units) - 1:
        number, step = number / 1000, step + 1
    digits = f"{number:.3g}" if number < 999.5 else f"{number:.0f}"
    return f"{digits} {units[step]}".strip()


def writes_bos(processor: VoCoLlamaProcessor) -> bool:
    """Whether the chat template starts a prompt with the BOS token."""
    if processor.chat_template is None:
        return False
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    return starts_with_bos(prompt, processor)


__all__ = ["folder_card", "make_card", "write_card"]
