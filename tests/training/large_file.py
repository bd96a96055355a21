"""Peak memory of a process that trains from a file of so many rows in LLaVA's format: `python large_file.py 1000000`.

It turns the file into a table, holds a part out, groups its rows, and reads batches as a trainer does.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).parents[1]))

from training.sft_helpers import config, noise_image, processor_and_model

from voco_llama_hf.training import VoCoSFTTrainer
from voco_llama_hf.training.llava_data import load_llava_data


TEXT = " ".join(["Well, what there is to be said about this picture takes a few words."] * 5)


def write(folder, num_rows):
    noise_image(np.random.default_rng(0)).save(folder / "a.png")
    path = folder / f"{num_rows}.json"
    with open(path, "w") as file:
        file.write("[")
        for i in range(num_rows):
            turns = [{"from": "human", "value": f"<image>\nRow {i}?"}, {"from": "gpt", "value": TEXT[: i % 300]}]
            row = {"id": str(i), "conversations": turns}
            if i % 10:
                row["image"] = "a.png"
            else:
                turns[0]["value"] = "Hello?"
            file.write(("," if i else "") + json.dumps(row))
        file.write("]")
    return path


def peak():
    """In MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def anonymous():
    """Memory of the process itself, in MB: without files that are mapped, whose pages the system takes back."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def main(folder, num_rows):
    path = write(Path(folder), num_rows)
    processor, model = processor_and_model()
    figures = {
        "rows": num_rows,
        "file_mb": path.stat().st_size / 2**20,
        "start_mb": peak(),
        "start_own_mb": anonymous(),
    }
    start = time.monotonic()
    parts = load_llava_data(path, test_size=1000, cache_dir=Path(folder) / "cache")
    figures |= {"table_s": time.monotonic() - start, "table_mb": peak()}
    start = time.monotonic()
    load_llava_data(path, test_size=1000, cache_dir=Path(folder) / "cache")
    figures["again_s"] = time.monotonic() - start
    args = config(Path(folder) / "out", group_by_modality_length=True, per_device_train_batch_size=8)
    trainer = VoCoSFTTrainer(model, args, train_dataset=parts["train"], processing_class=processor)
    start = time.monotonic()
    loader = iter(trainer.get_train_dataloader())
    next(loader)
    figures["first_batch_s"] = time.monotonic() - start
    for _ in range(100):
        next(loader)
    return {**figures, "end_mb": peak(), "end_own_mb": anonymous()}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
