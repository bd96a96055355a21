"""Indexes a folder in processes that are killed at random moments, and at last in one that is not.

python indexing_run.py CHECKPOINT FOLDER STORE NUM_KILLS
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from voco_llama_hf import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.store.indexing import Indexer, Sampling, find_files


def main(checkpoint: str, folder: str, store: str, num_kills: str) -> None:
    model = VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = VoCoLlamaProcessor.from_pretrained(checkpoint)

    def index(path: str) -> None:
        indexer = Indexer(
            Path(path), model, processor, 2, Sampling(num_frames=3), batch_size=2, shard_images=4, num_workers=0
        )
        for _ in indexer.run(indexer.select(find_files(folder))):
            pass

    def in_a_process(path: str) -> int:
        # Importing takes seconds, forking does not
        if (pid := os.fork()) == 0:
            index(path)
            os._exit(0)
        return pid

    start = time.perf_counter()
    assert os.waitpid(in_a_process(f"{store}.whole"), 0)[1] == 0
    duration = time.perf_counter() - start
    moments, num_killed = random.Random(0), 0
    for _ in range(int(num_kills)):
        pid = in_a_process(store)
        time.sleep(moments.uniform(0, duration / 2))
        os.kill(pid, signal.SIGKILL)
        num_killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert os.waitpid(in_a_process(store), 0)[1] == 0
    print(num_killed)


main(*sys.argv[1:])
