"""Text to ids: Hugging Face `tokenizer.json`, SentencePiece `*.model`, or plain bytes.

A text turn of the prompt is BOS, the tokens of "[speaker]text", EOS (SesameAILabs/csm
`generator.py`). That framing is made here and not left to the tokenizer file: Llama 3's own
post-processor adds BOS only.
"""

import abc
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from csm_jax.config import CSMConfig, TextTokenIds
from csm_jax.errors import CheckpointError, InputError, OutputError, first_line


def check_unicode(text: str) -> None:
    """Raises `InputError` for text that is not Unicode (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text has an invalid character at position {error.start}; give valid UTF-8"
        ) from error


class Tokenizer(abc.ABC):
    """Turns the text of a prompt into ids.

    Attributes:
      file_name: what `save` calls the file.
      bos, eos: the ids that `encode` puts around every text.
      vocab_size: one more than the largest id that `encode` can return.
    """

    file_name: str
    bos: int
    eos: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """BOS, the ids of `text`, EOS; each of the two exactly once, whatever is in the text.

        Raises `InputError` for text that is not Unicode (lone surrogates).
        """
        check_unicode(text)
        return [self.bos, *self._encode(text), self.eos]

    def encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """The ids of `encode`, each with the characters of `text` that it stands for.

        Returns:
          (id, start, end) of every id. BOS and EOS stand for no characters, and start where they
          end; ids of parts of one character have the same start and end.
        """
        check_unicode(text)
        end = len(text)
        return [(self.bos, 0, 0), *self._encode_with_offsets(text), (self.eos, end, end)]

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's file into an existing directory, byte for byte as it was read.

        Raises `OutputError` if that fails.
        """
        path = Path(directory) / self.file_name
        try:
            path.write_bytes(self._content())
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be written ({error.strerror}); choose another directory"
            ) from error

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of `text` alone."""

    @abc.abstractmethod
    def _encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """The ids of `text` alone, as `encode_with_offsets`."""

    @abc.abstractmethod
    def _content(self) -> bytes:
        """The content of the file."""


class BPETokenizer(Tokenizer):
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    Args:
      json: the text of the file.
      token_ids: gives BOS and EOS; those of the file are not used.

    Raises `CheckpointError` for text that is no such file.
    """

    file_name = "tokenizer.json"

    def __init__(self, json: str, token_ids: TextTokenIds):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(f"not a tokenizer.json ({first_line(error)})") from error
        # A text with "<|end_of_text|>" in it is to be spoken, not to end the turn.
        self._tokenizer.encode_special_tokens = True
        # Both can be set in the file, and would drop text or add padding to it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._json = json
        self.bos, self.eos = token_ids.bos, token_ids.eos
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(self.bos, self.eos, *ids) + 1

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return [(i, *offset) for i, offset in zip(encoded.ids, encoded.offsets, strict=True)]

    def _content(self) -> bytes:
        return self._json.encode()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, with its own BOS and EOS.

    Raises `CheckpointError` for bytes that are no such model, or one without BOS or EOS.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise CheckpointError(f"not a SentencePiece model ({first_line(error)})") from error
        self._model = model
        self.bos, self.eos = self._processor.bos_id(), self._processor.eos_id()
        if min(self.bos, self.eos) < 0:
            raise CheckpointError(
                f"the SentencePiece model has no BOS or no EOS (ids {self.bos} and {self.eos}); "
                "train it with both"
            )
        self.vocab_size = self._processor.vocab_size()

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        encoded = self._processor.encode_as_offset_mapping(text)
        return [(i, *offset) for i, offset in zip(encoded["ids"], encoded["offsets"], strict=True)]

    def _content(self) -> bytes:
        return self._model


def load_tokenizer(path: Path, config: CSMConfig) -> Tokenizer:
    """Reads a tokenizer file, or the one in a directory.

    In a directory: `tokenizer.json`, else `tokenizer.model`, else a single `*.model`. A file whose
    name ends in `.json` is a `BPETokenizer`, any other a `SentencePieceTokenizer`.

    Raises `CheckpointError` if there is none, it cannot be read, or it has ids that the text
    embedding of `config` has no row for.
    """
    path = _find(Path(path))
    try:
        content = path.read_bytes()
        tokenizer = (
            BPETokenizer(content.decode(), config.text_token_ids)
            if path.suffix == ".json"
            else SentencePieceTokenizer(content)
        )
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give a tokenizer.json or a *.model"
        ) from error
    except (CheckpointError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if tokenizer.vocab_size > config.text_vocab_size:
        raise CheckpointError(
            f"{path}: ids reach {tokenizer.vocab_size - 1} (BOS and EOS included), but the model "
            f"has {config.text_vocab_size} text embeddings; use the model's own tokenizer"
        )
    return tokenizer


def has_tokenizer(directory: Path) -> bool:
    """Whether `load_tokenizer` would find a file in a directory."""
    names = (BPETokenizer.file_name, SentencePieceTokenizer.file_name)
    return any((directory / name).is_file() for name in names) or any(directory.glob("*.model"))


def byte_tokenizer(config: CSMConfig) -> BPETokenizer:
    """One id per UTF-8 byte, 0..255 in the order of the byte-level alphabet.

    For models with random weights, which have no tokenizer of their own.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return BPETokenizer(tokenizer.to_str(), config.text_token_ids)


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (BPETokenizer.file_name, SentencePieceTokenizer.file_name):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.model"))
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        f"{path}: no tokenizer.json, no tokenizer.model and {len(found)} other *.model files "
        "where one is needed; copy the model's tokenizer there"
    )
