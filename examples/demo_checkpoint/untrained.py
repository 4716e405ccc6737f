"""A checkpoint to train: a trained codec, a new tokenizer, and random weights of the model."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import sentencepiece
from sizes import TEXT_VOCAB
from texts import ENDINGS

from csm_jax.checkpoints import native_format
from csm_jax.checkpoints.random_weights import random_tensors
from csm_jax.config import CSMConfig
from csm_jax.prompt.tokenizer import SentencePieceTokenizer


def write_untrained(
    out: Path, config: CSMConfig, codec: Mapping[str, np.ndarray], texts: Sequence[str]
) -> None:
    """Writes the checkpoint. `out` must not exist yet.

    Args:
      codec: the codec's weights by their paths. They are rounded to bfloat16, since the codec is
        shipped so, and the model must be trained on the codes of the rounded weights.
    """
    rounded = {f"codec/{path}": _rounded(weight) for path, weight in codec.items()}
    tensors = {path: rounded.get(path, tensor) for path, tensor in random_tensors(config)}
    native_format.save(out, config, sorted(tensors.items()), _train_tokenizer(config, texts))


def _train_tokenizer(config: CSMConfig, texts: Sequence[str]) -> SentencePieceTokenizer:
    """Trains a SentencePiece model on the texts, without distinction of capitals."""
    ids = config.text_token_ids
    # The format of a prompt: the speaker stands before the text.
    turns = [f"[{i % 10}]{text}" for i, text in enumerate(texts)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(turns),
        model_writer=model,
        vocab_size=TEXT_VOCAB,
        model_type="bpe",
        normalization_rule_name="nmt_nfkc_cf",
        character_coverage=1.0,
        unk_id=0,
        bos_id=ids.bos,
        eos_id=ids.eos,
        user_defined_symbols=["<audio>", "<audio_eos>", *(f"[{i}]" for i in range(10)), *ENDINGS],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


def _rounded(weight: np.ndarray) -> np.ndarray:
    """Rounds to bfloat16; returns float32."""
    return weight.astype(jnp.bfloat16).astype(np.float32)
