"""What the tasks beside this file show, and how they ask."""

from pathlib import Path


def image(doc):
    return [doc["image"].convert("RGB")]


def two_images(doc):
    return [doc["image"].convert("RGB"), doc["second"].convert("RGB")]


def interleaved(doc):
    first, second = two_images(doc)
    content = [
        {"type": "image", "url": first},
        {"type": "text", "text": "\n"},
        {"type": "image", "url": second},
        {"type": "text", "text": doc["question"]},
    ]
    return [{"role": "user", "content": content}]


def video(doc):
    return [str(Path(__file__).parent / doc["video"])]
