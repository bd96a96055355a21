"""Pieces of the page in HTML. All text that comes from visitors, files and models is escaped here."""

import html
from dataclasses import dataclass

from ..hub.card import scaled
from .engine import UNCOMPRESSED, Answer, Reading
from .sources import Source
from .stopwatch import Spent


# What Gradio's templates would take for code
TEMPLATE = {ord(mark): f"&#{ord(mark)};" for mark in "${}`\\"}
MAX_SQUARES = 64  # VoCo tokens that are drawn one by one
NUMBERS = ("vision", "language model", "tokens read")  # columns of the ledger
MAX_SMALL_GRID = 12  # cells a side that can be told apart on a frame of a video


@dataclass(frozen=True)
class Step:
    """
    A line of what was done so far.

    Args:
        what (`str`): The question, or what was compressed.
        answer (`str`): Empty for what is no question.
        spent (`Spent`): What it took.
        num_tokens (`int`): Tokens that the language model read for it.
        is_question (`bool`): Whether it is one.
    """

    what: str
    answer: str
    spent: Spent
    num_tokens: int
    is_question: bool


def text(value: str) -> str:
    """Text as text, whatever is in it."""
    return html.escape(value).translate(TEMPLATE)


def nbytes(number: float) -> str:
    return scaled(number, ("B", "kB", "MB", "GB"))


def flops(number: float) -> str:
    return scaled(number, ("", "k", "M", "G", "T"))


def ms(number: float) -> str:
    return f"{number:,.0f} ms" if number == 0 or number >= 9.5 else f"{number:.1f} ms"


def plural(number: int, one: str) -> str:
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def squares(number: int) -> str:
    """VoCo tokens, one by one where they are few."""
    drawn = "<i></i>" * min(number, MAX_SQUARES)
    rest = f"<em>+{number - MAX_SQUARES:,}</em>" if number > MAX_SQUARES else ""
    return f'<span class="squares" aria-hidden="true">{drawn}{rest}</span>'


def patches(source: Source, num_vision_tokens: int) -> str:
    """The picture under the grid of its vision tokens; of a video its frames."""
    side = round(num_vision_tokens**0.5)
    is_film = len(source.thumbnails) > 1
    kind = "tile plain" if is_film and side > MAX_SMALL_GRID else "tile"
    tiles = "".join(
        f'<span class="{kind}" style="--side:{side}"><img src="{url}" alt=""></span>' for url in source.thumbnails
    )
    return f'<div class="tiles {"film" if is_film else "photo"}">{tiles}</div>'


def nothing_yet(num_vision_tokens: int) -> str:
    """What is shown before anything is dropped."""
    return (
        '<div class="panel empty"><div class="flow">'
        '<div class="side"><div class="tiles photo"><span class="tile blank" '
        f'style="--side:{round(num_vision_tokens**0.5)}"></span></div>'
        f"<b>{num_vision_tokens} vision tokens</b><small>what a picture costs otherwise</small></div>"
        '<div class="arrow" aria-hidden="true">&#10140;</div>'
        f'<div class="side">{squares(2)}<b>k VoCo tokens</b><small>what is kept of it</small></div>'
        "</div><p>Drop a picture, or take an example: it is compressed at once, and drawn here.</p></div>"
    )


def picture(source: Source, reading: Reading, num_vision_tokens: int, full_bytes: int, num_voco_tokens: int) -> str:
    """What was compressed, before and after."""
    before = num_vision_tokens * source.num_images
    what = f"{source.num_images} frames of a video" if source.num_images > 1 else "a picture"
    if source.kind == "cache":
        left = '<div class="tiles photo"><span class="tile gone">no picture<br>any more</span></div>'
        note = (
            f"Loaded from {text(source.name)}. Nothing but VoCo tokens is left of {what}, and they answer as before."
        )
    else:
        left = patches(source, num_vision_tokens)
        cost = f"{ms(reading.spent.vision_ms)} of vision and {ms(reading.spent.language_ms)} of language model, once."
        again = "Compressed before in this visit: nothing had to be done."
        note = f"Compressed {what}: " + cost if reading.spent.total_ms > 0 else again
        if source.kind == "video":
            each = plural(num_voco_tokens, "VoCo token")
            note += f" {source.num_images} frames were sampled evenly over the video, with {each} each."
    ratio = before / reading.num_tokens
    return f"""<div class="panel" data-voco-tokens="{reading.num_tokens}">
  <div class="flow">
    <div class="side">{left}<b>{before:,} vision tokens</b><small>{nbytes(full_bytes)} of keys and values</small></div>
    <div class="arrow" aria-hidden="true">&#10140;</div>
    <div class="side">{squares(reading.num_tokens)}<b>{plural(reading.num_tokens, "VoCo token")}</b>
      <small>{nbytes(reading.nbytes)} of keys and values</small></div>
  </div>
  <div class="bars">
    <span>before</span><div class="bar"><i class="vision" style="width:100%"></i></div>
    <span>after</span><div class="bar"><i class="voco" style="width:{min(100, 100 / ratio):.2f}%"></i></div>
  </div>
  <p class="ratio"><b>{ratio:,.0f}&times; smaller</b> {note}</p>
</div>"""


def answered(question: str, answer: str, is_done: bool) -> str:
    """A question and its answer, as far as it has come."""
    more = "" if is_done else '<span class="caret"></span>'
    return f'<div class="said"><span>{text(question)}</span><b>{text(answer) or "&mdash;"}{more}</b></div>'


def split_bar(spent: Spent, longest: float) -> str:
    """Milliseconds as a bar, those of vision apart."""
    parts = (("vision", spent.vision_ms), ("language", spent.language_ms))
    drawn = "".join(f'<i class="{kind}" style="width:{100 * part / (longest or 1):.2f}%"></i>' for kind, part in parts)
    return f'<div class="bar" aria-hidden="true">{drawn}</div>'


LEGEND = (
    '<p class="legend"><i class="vision"></i>vision tower <i class="language"></i>language model '
    "<span>milliseconds on this machine, measured as they happened</span></p>"
)


def ledger(steps: list[Step]) -> str:
    """What was done so far, and what it took."""
    if not steps:
        return '<p class="hint">Every question will be listed here, with what it cost.</p>'
    longest = max(step.spent.total_ms for step in steps)
    rows = "".join(
        f'<tr class="{"question" if step.is_question else "made"}"><td>{text(step.what)}</td>'
        f"<td><b>{text(step.answer)}</b></td>"
        f'<td class="number vision-ms">{ms(step.spent.vision_ms)}</td>'
        f'<td class="number">{ms(step.spent.language_ms)}</td>'
        f'<td class="number">{step.num_tokens:,}</td>'
        f"<td>{split_bar(step.spent, longest)}</td></tr>"
        for step in steps
    )
    head = "".join(
        f"<th{' class=number' if name in NUMBERS else ''}>{name}</th>"
        for name in ("step", "answer", "vision", "language model", "tokens read", "")
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{LEGEND}'


def comparison(rows: list[tuple[int, Reading, Answer] | tuple[int, str]], num_images: int) -> str:
    """The same question read in several ways; one that failed says why."""
    answers = [row[2] for row in rows if len(row) == 3]
    longest = max((answer.spent.total_ms for answer in answers), default=0)
    cards = "".join(compared(row, longest, num_images) for row in rows)
    return f'<div class="ways">{cards}</div>{LEGEND}'


def compared(row: tuple[int, Reading, Answer] | tuple[int, str], longest: float, num_images: int) -> str:
    """One way of reading."""
    count = row[0]
    name = "uncompressed" if count == UNCOMPRESSED else f"k = {count}"
    kind = "whole" if count == UNCOMPRESSED else "kept"
    if len(row) == 2:
        return f'<div class="way {kind} failed"><h4>{name}</h4><p>{text(row[1])}</p></div>'
    _, reading, answer = row
    per = " a frame" if num_images > 1 else ""
    made = (
        "its pixels are read for every question"
        if count == UNCOMPRESSED
        else f"compressed once: {ms(reading.spent.total_ms)}"
        if reading.spent.total_ms > 0
        else "compressed before"
    )
    return f"""<div class="way {kind}" data-way="{name}"><h4>{name}{per}</h4>
  <p class="answer">{text(answer.text) or "&mdash;"}</p>
  <dl><dt>kept</dt><dd>{plural(reading.num_tokens, "token")}</dd>
  <dt>memory</dt><dd>{nbytes(reading.nbytes)}</dd>
  <dt>vision</dt><dd class="vision-ms">{ms(answer.spent.vision_ms)}</dd>
  <dt>language</dt><dd>{ms(answer.spent.language_ms)}</dd>
  <dt>FLOPs</dt><dd>{flops(answer.flops)}</dd></dl>
  {split_bar(answer.spent, longest)}<small>{made}</small></div>"""


__all__ = ["Step", "answered", "comparison", "ledger", "nothing_yet", "picture", "text"]
