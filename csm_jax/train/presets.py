"""Settings that others have published for fine-tuning CSM-1B, as values of the flags of a run.

Where a source counts epochs, the number of steps stays the user's. Losses are means over codes here
too, so `depth_weight` is 1 where a source adds the two means, and 31 where it takes the mean of all
32 codebooks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from csm_jax.errors import InputError
from csm_jax.model.lora import DEFAULT_TARGETS


@dataclass(frozen=True)
class Preset:
    """A published recipe.

    Attributes:
      source: where it was published.
      values: of the flags of `csm_jax.finetune`, by name.
    """

    source: str
    values: Mapping[str, object]


PRESETS = MappingProxyType(
    {
        # transformers' processor labels all frames, and its Trainer has Adam's usual moments.
        "unsloth": Preset(
            "github.com/unslothai/notebooks, Sesame_CSM_(1B)-TTS.ipynb",
            {
                "lora_rank": 32,
                "lora_alpha": 32.0,
                "lora_targets": list(DEFAULT_TARGETS),
                "learning_rate": 2e-4,
                "decay": "linear",
                "final_rate": 0.0,
                "warmup": 5,
                "steps": 60,
                "batch_size": 8,
                "accumulate": 4,
                "weight_decay": 0.01,
                "beta2": 0.999,
                "depth_share": 1.0,
                "seed": 3407,
            },
        ),
        # All weights, for new voices and languages; the README trains for 25 epochs.
        "speechmatics": Preset(
            "github.com/knottwill/sesame-finetune, configs/finetune_param_defaults.yaml",
            {
                "lora_rank": 0,
                "learning_rate": 3e-5,
                "decay": "linear",
                "final_rate": 0.0,
                "warmup": 1000,
                "steps": 10_000,
                "batch_size": 8,
                "weight_decay": 0.002,
                "clip": 1.3,
                "beta2": 0.999,
            },
        ),
        "csm-mlx": Preset(
            "github.com/senstella/csm-mlx, csm_mlx/cli/finetune/lora_finetune.py",
            {
                "lora_rank": 8,
                "lora_alpha": 16.0,
                "lora_targets": ["q", "k", "v", "o", "codebook0_head", "projection"],
                "learning_rate": 5e-4,
                "decay": "constant",
                "warmup": 0,
                "batch_size": 4,
                "weight_decay": 1e-4,
                "clip": 1e9,
                "beta2": 0.999,
                "depth_share": 1.0,
                "depth_weight": 31.0,
            },
        ),
        # The backbone stays as it is; neither rate nor batch were published.
        "decoder-only": Preset(
            "huggingface.co/Tachyeon/csm-1b-conversational-finetuned",
            {
                "lora_rank": 0,
                "train": ["projection", "depth_decoder", "depth_heads"],
                "steps": 5000,
            },
        ),
    }
)


def find_preset(name: str) -> Preset:
    """The preset of a name. Raises `InputError` if there is none."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name}: there are {', '.join(PRESETS)}")
    return PRESETS[name]
