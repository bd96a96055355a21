"""What the page says."""

HEADER = """<header>
  <h1>Compress once, ask many times</h1>
  <p>A vision-language model keeps hundreds of tokens in memory for every picture, and reads them again for every
  question. In <b>VoCo-LLaMA</b> the language model squeezes them into a few <b>VoCo tokens</b>. The picture can then
  be forgotten: each question reads those few tokens and nothing else.</p>
</header>"""

SAVE_AND_LOAD = """
**What is kept is a small file.** It holds the keys and values of the VoCo tokens and a fingerprint of the model that
made them: no picture, no pixels. Save it, drop it here later, and ask on. A file of another model is refused.
"""

HOW_IT_WORKS = """
### In three steps

1. **See.** A vision tower turns the picture into {vision_tokens} vision tokens, one for each patch of the grid.
2. **Compress.** The language model reads them once, followed by *k* special tokens called `<voco>`. What those k
   tokens have understood ends up in their keys and values, which are the model's memory of them.
3. **Ask.** Everything else is dropped. A question attends to the k VoCo tokens and to itself, never to the vision
   tokens: so the vision tower has nothing to do any more, and where the language model would read {vision_tokens}
   tokens of the picture, it reads k.

### What you see here is measured

- **vision** is clocked inside the vision tower and its projector. For a question it is 0 ms because they are not run.
- **language model** is the rest of the time that the model takes. A small model on a busy machine scatters.
- **keys and values** are the bytes of this model's memory of the picture, in the data type that it runs in.
- **FLOPs** are counted for this configuration, not measured: what a further question takes up to its first word, with
  the picture compressed before, or read anew where it says *uncompressed*.

The method: Ye et al., [VoCo-LLaMA: Towards Vision Compression with Large Language Models](https://arxiv.org/abs/2406.12275),
CVPR 2025.
"""

__all__ = ["HEADER", "HOW_IT_WORKS", "SAVE_AND_LOAD"]
