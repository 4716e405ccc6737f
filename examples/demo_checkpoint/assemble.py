"""Makes a checkpoint to train: the trained codec, a new tokenizer, and random model weights.

    python examples/demo_checkpoint/assemble.py --speech=demo/speech --codec=demo/codec \
        --out=demo/untrained
"""

from pathlib import Path

from absl import app, flags, logging
from safetensors.numpy import load_file
from sizes import CODEC_WEIGHTS, MODEL
from untrained import write_untrained

SPEECH = flags.DEFINE_string("speech", "demo/speech", "directory of synthesize.py")
CODEC = flags.DEFINE_string("codec", "demo/codec", "directory of train_codec.py")
OUT = flags.DEFINE_string("out", "demo/untrained", "directory to write; must not exist yet")


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    texts = (Path(SPEECH.value) / "texts.txt").read_text().splitlines()
    write_untrained(Path(OUT.value), MODEL, load_file(Path(CODEC.value) / CODEC_WEIGHTS), texts)


if __name__ == "__main__":
    app.run(main)
