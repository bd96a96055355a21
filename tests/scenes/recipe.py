"""A recipe of two phases with a few steps each, which the tests share: `from scenes.recipe import RECIPE`."""

from voco_llama_hf.scenes.recipe import Phase, Recipe


RECIPE = Recipe(
    num_train_scenes=64,
    num_validation_scenes=8,
    num_test_scenes=8,
    batch_size=4,
    vision_batch_size=4,
    vision_steps=2,
    vision_layers=1,
    text_layers=1,
    phases=(
        Phase("uncompressed", 2, 1e-3, "constant_with_warmup", num_voco_tokens=(0,), describe=True),
        Phase("voco", 3, 1e-3, "warmup_stable_decay", num_voco_tokens=(1, 2, 0), describe=True, single=True),
    ),
)
