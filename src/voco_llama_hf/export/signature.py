"""What the graphs of a model take and return, and whether given ones do."""

from transformers import PreTrainedConfig

from ..modeling.configuration_voco_llama import key_value_shape
from .files import FINGERPRINT
from .session import TorchSession


class Signature:
    """
    Names and shapes of keys and values in the graphs of a text model.

    Args:
        text_config ([`~transformers.PreTrainedConfig`]): Configuration of the text model.
        is_tiled (`bool`, *optional*, defaults to `False`): Whether images are divided into tiles.
    """

    def __init__(self, text_config: PreTrainedConfig, is_tiled: bool = False):
        self.layers, self.heads, self.head_dim = key_value_shape(text_config)
        self.images = "image_features" if is_tiled else "pixel_values"
        self.presents = [f"present.{layer}.{kind}" for layer in range(self.layers) for kind in ("key", "value")]
        self.pasts = [name.replace("present", "past_key_values") for name in self.presents]

    def check(self, compressor: TorchSession, decoder: TorchSession) -> None:
        """
        Raises:
            ValueError: if the graphs have other inputs or outputs than their configuration asks for.
        """
        self._check_graph(compressor, "compressor", [self.images, "num_voco_tokens"], self.presents)
        text = ["input_ids", "attention_mask", "position_ids"]
        self._check_graph(decoder, "decoder", [*text, *self.pasts], ["logits", *self.presents])
        if FINGERPRINT not in compressor.metadata:
            raise ValueError("the compressor is not a graph of this package: it does not say which model it is of")

    def _check_graph(self, session: TorchSession, name: str, inputs: list[str], outputs: list[str]) -> None:
        for kind, expected, found in (
            ("inputs", inputs, set(session.input_types)),
            ("outputs", outputs, set(session.output_types)),
        ):
            if differing := sorted(set(expected) ^ found):
                raise ValueError(
                    f"the {name} is not a graph of this model: it has other {kind} than its configuration says, "
                    f"first {differing[0]}"
                )
        values = session.session.get_outputs()
        shapes = {tuple(value.shape[1::2]) for value in values if value.name.startswith("present")}
        if shapes != {(self.heads, self.head_dim)}:
            raise ValueError(
                f"the {name} is not a graph of this model: its keys and values have (heads, head size) "
                f"{sorted(shapes)}, its configuration says {(self.heads, self.head_dim)}"
            )
