"""A page to try a model in the browser. The engine works without Gradio; page and launch need the extra demo."""

from .engine import DemoEngine


__all__ = ["DemoEngine"]
