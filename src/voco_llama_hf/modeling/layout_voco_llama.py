"""Where everything stands: images in the short sequence of a user, and in the long one inside the model."""

from dataclasses import dataclass

import numpy as np
import torch


def resolve_num_voco_tokens(
    num_voco_tokens: int | list[int] | torch.Tensor | None, num_images: int, num_tokens: int
) -> list[int]:
    """
    VoCo tokens of each image of a call.

    Args:
        num_voco_tokens (`int`, `list[int]` or `torch.LongTensor`, *optional*):
            One number for every image, or one number an image. `None` divides the `<voco>` tokens evenly.
        num_images (`int`):
            Images of the call.
        num_tokens (`int`):
            `<voco>` tokens of the call.

    Raises:
        ValueError: if the numbers do not fit; the message names both counts.
    """
    if num_voco_tokens is None:
        if num_images == 0 or num_tokens == 0 or num_tokens % num_images:
            raise ValueError(
                f"the input has {num_tokens} <voco> tokens for {num_images} images, which does not divide evenly: "
                "pass num_voco_tokens, one number an image"
            )
        return [num_tokens // num_images] * num_images
    counts = per_image_counts(num_voco_tokens, num_images)
    if sum(counts) != num_tokens:
        raise ValueError(
            f"{num_images} images at num_voco_tokens={counts} need {sum(counts)} <voco> tokens, "
            f"but the input has {num_tokens}"
        )
    return counts


def per_image_counts(num_voco_tokens: int | list[int] | torch.Tensor, num_images: int) -> list[int]:
    """
    One number an image from one number or from one number an image.

    Raises:
        ValueError: if there are more or fewer numbers than images, or one is below 1.
    """
    if isinstance(num_voco_tokens, torch.Tensor):
        num_voco_tokens = num_voco_tokens.tolist()
    counts = [num_voco_tokens] * num_images if isinstance(num_voco_tokens, int) else list(num_voco_tokens)
    if len(counts) != num_images:
        raise ValueError(f"num_voco_tokens has {len(counts)} numbers, but there are {num_images} images")
    if any(count < 1 for count in counts):
        raise ValueError(f"num_voco_tokens must be at least 1, got {counts}")
    return counts


def torn_apart(counts: list[int], image: int) -> ValueError:
    return ValueError(
        f"the <voco> tokens do not stand together as images of {counts} tokens: image {image} is torn apart"
    )


def find_starts(voco_mask: np.ndarray, counts: list[int]) -> np.ndarray:
    """
    Columns of the first `<voco>` token of each image. On the host, where a question about compressed images is read:
    steps this small take NumPy a fraction of the time.

    Args:
        voco_mask (`np.ndarray` of shape `(batch_size, sequence_length)`):
            True at `<voco>` tokens, `sum(counts)` of them.
        counts (`list[int]`):
            VoCo tokens of each image, in the order in which the images stand in the batch.

    Raises:
        ValueError: if the tokens of an image are not neighbours in one row.
    """
    rows, columns = voco_mask.nonzero()
    lengths = np.array(counts, dtype=int)
    ends = lengths.cumsum()
    starts = ends - lengths
    follows = np.ones(len(rows), dtype=bool)
    follows[starts] = False
    is_neighbour = (np.diff(rows, prepend=-1) == 0) & (np.diff(columns, prepend=-1) == 1)
    torn = (follows & ~is_neighbour).nonzero()[0]
    if len(torn) > 0:
        raise torn_apart(counts, int(np.searchsorted(ends, torn[0], side="right")))
    return columns[starts]


@dataclass
class VoCoRuns:
    """
    Where the `<voco>` tokens of each image stand in the short sequence.

    Args:
        rows, starts, counts (`torch.LongTensor` of shape `(num_images,)`):
            Row of the batch, column of the first `<voco>` token and number of tokens of each image.
        token_rows, token_columns, token_images, token_offsets (`torch.LongTensor` of shape `(num_tokens,)`):
            The same for every `<voco>` token: its row, its column, its image and its place 0..k-1 in the image.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    token_rows: torch.Tensor
    token_columns: torch.Tensor
    token_images: torch.Tensor
    token_offsets: torch.Tensor

    @classmethod
    def find(cls, voco_mask: torch.Tensor, counts: list[int]) -> "VoCoRuns":
        """
        Args:
            voco_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
                True at `<voco>` tokens, `sum(counts)` of them.
            counts (`list[int]`):
                VoCo tokens of each image, in the order in which the images stand in the batch.

        Raises:
            ValueError: if the tokens of an image are not neighbours in one row.
        """
        device = voco_mask.device
        token_rows, token_columns = voco_mask.nonzero(as_tuple=True)
        image_counts = torch.tensor(counts, dtype=torch.long, device=device)
        token_images = torch.arange(len(counts), device=device).repeat_interleave(image_counts)
        first = image_counts.cumsum(0) - image_counts
        token_offsets = torch.arange(len(token_rows), device=device) - first[token_images]
        rows, starts = token_rows[first], token_columns[first]
        torn = (token_rows != rows[token_images]) | (token_columns != starts[token_images] + token_offsets)
        if torn.any():
            raise torn_apart(counts, int(token_images[torn][0]))
        return cls(rows, starts, image_counts, token_rows, token_columns, token_images, token_offsets)


@dataclass
class ExpandedLayout:
    """
    Where everything stands once every image has its vision tokens in the sequence.

    Args:
        length (`int`):
            Length of the long sequence. Rows with fewer images are padded on the right.
        short (`torch.LongTensor` of shape `(batch_size, short_length)`):
            Place of each token of the short sequence. Without VoCo tokens in the long sequence (`"uncompressed"`)
            theirs are the last vision tokens, so that the last VoCo token reads what precedes the text.
        prefix, suffix (`torch.LongTensor` of shape `(num_prefixed, P)` and `(num_images, S)`):
            Places of the tokens that were inserted around the vision tokens.
        prefix_rows (`torch.LongTensor` of shape `(num_prefixed,)`):
            Rows of the batch of `prefix`: in `"uncompressed"` mode only rows that start with an image have one.
        vision, vision_images (`torch.LongTensor` of shape `(num_vision_tokens,)`):
            Places of the vision tokens of all images, image after image, and the image of each.
    """

    length: int
    short: torch.Tensor
    prefix: torch.Tensor
    prefix_rows: torch.Tensor
    vision: torch.Tensor
    vision_images: torch.Tensor
    suffix: torch.Tensor

    @classmethod
    def build(
        cls,
        runs: VoCoRuns,
        attention_mask: torch.Tensor,
        num_prefix: int,
        num_vision: list[int],
        num_suffix: int,
        mode: str,
    ) -> "ExpandedLayout":
        """
        Lays out the long sequence for one attention mode; `attention_mask` is that of the short sequence, `num_vision`
        one number an image.
        """
        batch_size, short_length = attention_mask.shape
        device = attention_mask.device
        if mode == "uncompressed":
            # A row that starts with an image has no BOS of its own: the prefix is its BOS
            has_prefix = runs.starts == attention_mask.long().argmax(-1)[runs.rows]
            num_suffix, removed = 0, runs.counts
        else:
            has_prefix, removed = torch.ones_like(runs.starts, dtype=torch.bool), torch.zeros_like(runs.counts)
        lengths = torch.tensor(num_vision, dtype=torch.long, device=device)
        inserted = has_prefix * num_prefix + lengths + num_suffix

        shift = torch.zeros(batch_size, short_length + 1, dtype=torch.long, device=device)
        shift = shift.index_put((runs.rows, runs.starts), inserted, accumulate=True)
        shift = shift.index_put((runs.rows, runs.starts + runs.counts), -removed, accumulate=True).cumsum(-1)
        short = torch.arange(short_length, device=device) + shift[:, :-1]
        begin = short[runs.rows, runs.starts] - inserted
        behind = begin + has_prefix * num_prefix + lengths  # the vision tokens
        total = sum(num_vision)
        vision_images = torch.arange(len(num_vision), device=device).repeat_interleave(lengths, output_size=total)
        vision = torch.arange(total, device=device) + (behind - lengths.cumsum(0))[vision_images]
        if mode == "uncompressed":
            from_end = runs.counts[runs.token_images] - runs.token_offsets
            from_end = torch.minimum(from_end, lengths[runs.token_images])
            short[runs.token_rows, runs.token_columns] = behind[runs.token_images] - from_end
        return cls(
            length=short_length + int(shift[:, -1].max()),
            short=short,
            prefix=begin[has_prefix, None] + torch.arange(num_prefix, device=device),
            prefix_rows=runs.rows[has_prefix],
            vision=vision,
            vision_images=vision_images,
            suffix=behind[:, None] + torch.arange(num_suffix, device=device),
        )

    def attention_mask(self, short_mask: torch.Tensor, runs: VoCoRuns) -> torch.Tensor:
        """`(batch_size, length)` mask of the long sequence: True at tokens, False at padding."""
        mask = torch.zeros(short_mask.shape[0], self.length, dtype=torch.bool, device=short_mask.device)
        mask.scatter_(1, self.short, short_mask.bool())
        mask[self.prefix_rows[:, None], self.prefix] = True
        mask[runs.rows[self.vision_images], self.vision] = True
        mask[runs.rows[:, None], self.suffix] = True
        return mask

    def segments(self, runs: VoCoRuns, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`segment_ids` and `readable` of [`voco_mask_function`], both of shape `(batch_size, length)`."""
        segment_ids = torch.zeros(batch_size, self.length, dtype=torch.long, device=self.short.device)
        number = torch.arange(1, len(runs.rows) + 1, device=self.short.device)
        for places in (self.prefix, self.suffix):
            segment_ids[runs.rows[:, None], places] = number[:, None]
        segment_ids[runs.rows[self.vision_images], self.vision] = number[self.vision_images]
        readable = segment_ids == 0
        voco = self.short[runs.token_rows, runs.token_columns]
        segment_ids[runs.token_rows, voco] = number[runs.token_images]
        return segment_ids, readable

    def compact_positions(self, short_positions: torch.Tensor, runs: VoCoRuns) -> torch.Tensor:
        """
        `(batch_size, length)` positions that cost an image k places: the short sequence keeps its numbers, and prefix,
        vision and suffix tokens count down from their first VoCo token.
        """
        positions = torch.zeros(
            short_positions.shape[0], self.length, dtype=torch.long, device=short_positions.device
        ).scatter(1, self.short, short_positions)
        below = (short_positions - self.short)[runs.rows, runs.starts]
        for places in (self.prefix, self.suffix):
            positions[runs.rows[:, None], places] = places + below[:, None]
        positions[runs.rows[self.vision_images], self.vision] = self.vision + below[self.vision_images]
        return positions


@torch.compiler.disable
def lay_out(
    voco_mask: torch.Tensor,
    num_voco_tokens: int | list[int] | torch.Tensor | None,
    attention_mask: torch.Tensor,
    num_prefix: int,
    num_vision: list[int],
    num_suffix: int,
    mode: str,
) -> tuple[VoCoRuns, ExpandedLayout]:
    """
    Where images stand in the short and in the long sequence. All that depends on the content of a batch is found out
    here, so that a compiled pass is interrupted once.

    Args:
        voco_mask, attention_mask (`torch.Tensor` of shape `(batch_size, short_length)`):
            True at `<voco>` tokens, and at tokens that are no padding.
        num_voco_tokens (`int`, `list[int]` or `torch.LongTensor`, *optional*):
            VoCo tokens of every image, or of each.
        num_prefix, num_suffix (`int`):
            Tokens that every image brings along.
        num_vision (`list[int]`):
            Vision tokens of each image.
        mode (`str`):
            `"voco"`, `"causal"` or `"uncompressed"`.

    Raises:
        ValueError: if images, `<voco>` tokens and `num_voco_tokens` do not fit.
    """
    runs = VoCoRuns.find(voco_mask, resolve_num_voco_tokens(num_voco_tokens, len(num_vision), int(voco_mask.sum())))
    return runs, ExpandedLayout.build(runs, attention_mask, num_prefix, num_vision, num_suffix, mode)


__all__ = ["ExpandedLayout", "VoCoRuns", "find_starts", "lay_out", "per_image_counts", "resolve_num_voco_tokens"]
