"""Makes a checkpoint to train: the trained codec, a new tokenizer, and random model weights.

    python examples/demo_checkpoint/assemble.py --speech=demo/speech --codec=demo/codec \
        --out=demo/untrained
"""

import io
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import sentencepiece
from absl import app, flags, logging
from safetensors.numpy import load_file
from sizes import CODEC_WEIGHTS, MODEL, TEXT_VOCAB
from texts import ENDINGS

from csm_jax.checkpoints import native_format
from csm_jax.checkpoints.random_weights import random_tensors
from csm_jax.prompt.tokenizer import SentencePieceTokenizer

SPEECH = flags.DEFINE_string("speech", "demo/speech", "directory of synthesize.py")
CODEC = flags.DEFINE_string("codec", "demo/codec", "directory of train_codec.py")
OUT = flags.DEFINE_string("out", "demo/untrained", "directory to write; must not exist yet")


def train_tokenizer(texts: list[str]) -> SentencePieceTokenizer:
    """Trains a SentencePiece model on the texts, without distinction of capitals."""
    ids = MODEL.text_token_ids
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


def rounded(weight: np.ndarray) -> np.ndarray:
    """Rounds to bfloat16; returns float32."""
    return weight.astype(jnp.bfloat16).astype(np.float32)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    texts = (Path(SPEECH.value) / "texts.txt").read_text().splitlines()
    weights = load_file(Path(CODEC.value) / CODEC_WEIGHTS)
    # The shipped codec is bfloat16: the model must be trained on the codes of the rounded weights.
    codec = {f"codec/{path}": rounded(weight) for path, weight in weights.items()}
    tensors = {path: codec.get(path, tensor) for path, tensor in random_tensors(MODEL)}
    native_format.save(Path(OUT.value), MODEL, sorted(tensors.items()), train_tokenizer(texts))


if __name__ == "__main__":
    app.run(main)
