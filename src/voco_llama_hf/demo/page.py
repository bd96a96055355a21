"""The page: what stands where, and what happens when something is dropped, chosen or asked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from . import drawing
from .drawing import Step
from .engine import MAX_QUESTION, UNCOMPRESSED, DemoEngine, Reading
from .examples import Example
from .gate import uploads_only
from .sources import Source
from .texts import HEADER, HOW_IT_WORKS, SAVE_AND_LOAD


COUNTS = (1, 2, 4, 8)
COMPARED = (1, 2, 8, UNCOMPRESSED)
MAX_CHIPS = 4
MAX_STEPS = 50  # that are listed
SESSION_SECONDS = 3600
MAX_MESSAGE = 400  # characters of an error


def shown(call: Callable) -> Callable:
    """Errors that a visitor can do something about appear in the page, as text."""

    def as_message(error: Exception) -> gr.Error:
        message = str(error)
        message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " ..."
        return gr.Error(drawing.text(message), print_exception=False)

    @functools.wraps(call)
    def returned(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except (ValueError, ImportError) as error:
            raise as_message(error) from error

    @functools.wraps(call)
    def yielded(*args: Any, **kwargs: Any) -> Any:
        try:
            yield from call(*args, **kwargs)
        except (ValueError, ImportError) as error:
            raise as_message(error) from error

    return yielded if inspect.isgeneratorfunction(call) else returned


class Visit:
    """
    What the page's events do. A visitor's source and steps are Gradio's states, handed in and out.

    Args:
        engine ([`DemoEngine`]): Does the work.
        folder (`Path`): Where files to download are written.
        examples (`Sequence[Example]`): What can be taken instead of dropping something.
        questions (`Sequence[str]`): What is proposed for anything else.
    """

    def __init__(self, engine: DemoEngine, folder: Path, examples: Sequence[Example], questions: Sequence[str]):
        self.engine, self.folder = engine, folder
        self.examples, self.questions = examples, questions

    @shown
    def drop(self, path: str | None, count: int, request: gr.Request, per_tile: bool = False) -> tuple:
        """An image or a video was uploaded, or taken away."""
        if path is None:
            return self.clear()
        source, reading = self.engine.open(path, str(request.session_hash), count, per_tile)
        return self._opened(source, reading, count, per_tile, self.questions)

    def clear(self) -> tuple:
        """Nothing is left of a visit."""
        empty = drawing.nothing_yet(self.engine.num_vision_tokens)
        return None, [], empty, drawing.ledger([]), "", "", "", *chips(self.questions)

    @shown
    def take(self, index: int, count: int, request: gr.Request, per_tile: bool = False) -> tuple:
        """An example was chosen."""
        example = self.examples[index]
        source, reading = self.engine.open(str(example.path), str(request.session_hash), count, per_tile)
        return None, *self._opened(source, reading, count, per_tile, example.questions)

    @shown
    def load(self, path: str | None, request: gr.Request) -> tuple:
        """A file of compressed images was uploaded."""
        if path is None:
            return None, *self.clear()
        source, reading = self.engine.open_cache(path, str(request.session_hash))
        return None, *self._opened(source, reading, 0, False, self.questions)

    def _opened(self, source: Source, reading: Reading, count: int, per_tile: bool, questions: Sequence[str]) -> tuple:
        steps = [self._made(source, reading, count, per_tile)]
        picture = self._picture(source, reading, count)
        proposed = questions[0] if questions else ""
        return source, steps, picture, drawing.ledger(steps), "", "", proposed, *chips(questions)

    def _picture(self, source: Source, reading: Reading, count: int) -> str:
        num_vision_tokens = self.engine.num_vision_tokens
        full_bytes = self.engine.nbytes(num_vision_tokens * source.num_images)
        return drawing.picture(source, reading, num_vision_tokens, full_bytes, count)

    def _made(self, source: Source, reading: Reading, count: int, per_tile: bool) -> Step:
        """The step of compressing. What was there already took no reading."""
        each = " a frame" if source.kind == "video" else " a tile" if per_tile else ""
        what = f"load {source.name}" if source.kind == "cache" else f"compress {source.name}, k = {count}{each}"
        num_read = source.num_images * self.engine.cost.num_segment_tokens + reading.num_tokens
        is_new = source.kind != "cache" and reading.spent.total_ms > 0
        return Step(what, "", reading.spent, num_read if is_new else 0, False)

    @shown
    def choose(self, source: Source | None, steps: list[Step], count: int, per_tile: bool = False) -> tuple:
        """Another number of VoCo tokens was chosen, or whose it is."""
        if source is None:
            return steps, gr.skip(), gr.skip()
        if source.kind == "cache":
            gr.Info("A loaded file keeps the tokens that it was saved with. Drop a picture to choose.")
            return steps, gr.skip(), gr.skip()
        reading = self.engine.compress(source, count, per_tile)
        steps = [*steps, self._made(source, reading, count, per_tile)][-MAX_STEPS:]
        return steps, self._picture(source, reading, count), drawing.ledger(steps)

    @shown
    def ask(
        self, source: Source | None, steps: list[Step], count: int, question: str, per_tile: bool = False
    ) -> Iterator[tuple]:
        """A question, answered as the words come."""
        source = present(source)
        for answer in self.engine.ask(source, kept(source, count), question, per_tile):
            box = drawing.answered(question, answer.text, answer.is_done)
            if not answer.is_done:
                yield steps, box, gr.skip()
        steps = [*steps, Step(question, answer.text, answer.spent, answer.num_prompt_tokens, True)][-MAX_STEPS:]
        yield steps, box, drawing.ledger(steps)

    @shown
    def compare(self, source: Source | None, question: str, per_tile: bool = False) -> Iterator[str]:
        """The same question, read in several ways. One that fails says so in its column."""
        source = present(source)
        rows: list[Any] = []
        for count in COMPARED:
            try:
                rows += self.engine.compare(source, question, [count], per_tile)
            except ValueError as error:
                if source.kind == "cache" or not question.strip():
                    raise
                rows.append((count, str(error)))
            yield drawing.comparison(rows, source.num_images)

    @shown
    def save(self, source: Source | None, count: int, per_tile: bool = False) -> str:
        """A file of what is kept, to be downloaded."""
        source = present(source)
        return str(self.engine.save(source, kept(source, count), str(self.folder), per_tile))


def present(source: Source | None) -> Source:
    """
    Raises:
        ValueError: if nothing was dropped yet.
    """
    if source is None:
        raise ValueError("there is no picture yet: drop one, or take an example")
    return source


def kept(source: Source, count: int) -> int:
    """VoCo tokens to ask for: a loaded file has those that it has."""
    return 0 if source.kind == "cache" else count


def chips(questions: Sequence[str], **options: Any) -> list[gr.Button]:
    """Buttons of proposed questions; those left over are hidden."""
    padded = [*questions[:MAX_CHIPS], *[""] * (MAX_CHIPS - len(questions))]
    return [gr.Button(question, visible=bool(question), **options) for question in padded]


def build_page(
    engine: DemoEngine, folder: Path, about: str, examples: Sequence[Example] = (), questions: Sequence[str] = ()
) -> gr.Blocks:
    """
    Args:
        engine ([`DemoEngine`]): Does the work.
        folder (`Path`): Where files to download are written.
        about (`str`): What the model knows, in Markdown.
        examples (`Sequence[Example]`, *optional*): What can be taken instead of dropping something.
        questions (`Sequence[str]`, *optional*): What is proposed for anything else.
    """
    visit = Visit(engine, folder, examples, questions)
    model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    private: dict[str, Any] = {**model, "api_visibility": "private"}
    with gr.Blocks(title="VoCo-LLaMA", analytics_enabled=False, delete_cache=(600, SESSION_SECONDS)) as page:
        source = gr.State(None, time_to_live=SESSION_SECONDS)
        steps = gr.State([], time_to_live=SESSION_SECONDS)
        gr.HTML(HEADER, padding=False)
        gr.Markdown(about, elem_classes="about")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                upload, count, per_tile, taken = build_input(engine, examples)
            with gr.Column(scale=6, min_width=340):
                picture = gr.HTML(drawing.nothing_yet(engine.num_vision_tokens), padding=False, elem_id="picture")
        with gr.Tabs():
            with gr.Tab("Ask"):
                question, send, proposed, answer, ledger = build_asking(questions)
            with gr.Tab("Compare"):
                compared, start, comparison = build_comparing()
            with gr.Tab("Save and load"):
                save, file, load = build_keeping()
            with gr.Tab("How it works"):
                gr.Markdown(HOW_IT_WORKS.format(vision_tokens=engine.num_vision_tokens), elem_classes="reading")

        opened = [source, steps, picture, ledger, answer, comparison, compared, *proposed]
        upload.upload(visit.drop, [upload, count, *per_tile], opened, api_name="compress", **model)
        upload.clear(visit.clear, None, opened, api_visibility="private")
        for index, button in enumerate(taken):
            button.click(visit.take, [gr.State(index), count, *per_tile], [upload, *opened], **private)
        chosen = [count.input, *(box.input for box in per_tile)]
        gr.on(chosen, visit.choose, [source, steps, count, *per_tile], [steps, picture, ledger], **private)

        asking: dict[str, Any] = {
            "inputs": [source, steps, count, question, *per_tile],
            "outputs": [steps, answer, ledger],
        }
        gr.on([send.click, question.submit], visit.ask, **asking, api_name="ask", **model)
        for chip in proposed:
            chip.click(str, chip, question, api_visibility="private", queue=False).then(visit.ask, **asking, **private)
        comparing = [source, compared, *per_tile]
        gr.on([start.click, compared.submit], visit.compare, comparing, comparison, api_name="compare", **model)
        # The file is written when it is asked for, and its download starts by itself
        save.click(visit.save, [source, count, *per_tile], file, api_name="save", **model).success(
            None, js="() => document.querySelector('#file, #file a').click()"
        )
        load.upload(visit.load, load, [upload, *opened], api_name="load", **model)
    return page


def build_input(
    engine: DemoEngine, examples: Sequence[Example]
) -> tuple[gr.File, gr.Radio, list[gr.Checkbox], list[gr.Button]]:
    """What is dropped, into how many tokens it goes and, of a model that divides images, whether each tile does."""
    limits = engine.limits
    upload = uploads_only(
        gr.File(label="Drop a picture or a short video", file_types=["image", "video"], height=170, elem_id="upload")
    )
    bounds = (
        f"At most {limits.max_request_bytes / 1e6:g} MB and {limits.max_pixels / 1e6:g} megapixels; of a video "
        f"{engine.num_frames} frames are read, evenly spaced. Files are forgotten after an hour."
    )
    gr.HTML(f'<p class="hint">{bounds}</p>', padding=False)
    taken = []
    if examples:
        with gr.Row(elem_classes="examples"):
            taken = [gr.Button(each.label, icon=str(each.icon), size="sm", min_width=90) for each in examples]
    count = gr.Radio(
        list(COUNTS),
        value=2,
        label="VoCo tokens to keep (k)",
        info="Fewer tokens are smaller, more tell more. Of a video, for every frame.",
        elem_id="count",
    )
    per_tile = []
    if engine.divides_images:
        info = "Of a large picture, which the model reads in tiles: each keeps k tokens of its own."
        box = gr.Checkbox(engine.per_tile, label="k for every tile", info=info, elem_id="per-tile")
        per_tile = [box]
    return upload, count, per_tile, taken


def build_asking(questions: Sequence[str]) -> tuple:
    """Question, proposals, answer and what it all took."""
    question, send = build_line("question", "Ask about the picture", "ask")
    with gr.Row(elem_classes="chips"):
        proposed = chips(questions, size="sm", min_width=60)
    answer = gr.HTML("", elem_id="answer", padding=False)
    ledger = gr.HTML(drawing.ledger([]), elem_id="ledger", padding=False)
    return question, send, proposed, answer, ledger


def build_line(name: str, placeholder: str, verb: str) -> tuple[gr.Textbox, gr.Button]:
    """A line to type a question into, and the button that sends it."""
    with gr.Row(elem_classes="line"):
        line = gr.Textbox(
            show_label=False,
            container=False,
            placeholder=placeholder,
            max_length=MAX_QUESTION,
            scale=8,
            elem_id=name,
        )
        send = gr.Button(verb.capitalize(), variant="primary", scale=1, min_width=110, elem_id=verb)
    return line, send


def build_comparing() -> tuple[gr.Textbox, gr.Button, gr.HTML]:
    """One question, several ways of reading."""
    gr.HTML(
        '<p class="hint">The same question, read from 1, 2 and 8 VoCo tokens and from all vision tokens, '
        "as a LLaVA of the same weights does.</p>",
        padding=False,
    )
    compared, start = build_line("compared-question", "Ask it in every way", "compare")
    return compared, start, gr.HTML("", elem_id="comparison", padding=False)


def build_keeping() -> tuple[gr.Button, gr.DownloadButton, gr.File]:
    """What is kept as a file, and back."""
    gr.Markdown(SAVE_AND_LOAD, elem_classes="reading")
    with gr.Row(equal_height=False):
        with gr.Column():
            save = gr.Button("Save what is kept", variant="primary", elem_id="save")
            file = gr.DownloadButton("Download", visible="hidden", elem_id="file")
        with gr.Column():
            load = uploads_only(
                gr.File(label="Drop a VoCoCache file", file_types=[".safetensors"], height=130, elem_id="load")
            )
    return save, file, load


__all__ = ["build_page"]
