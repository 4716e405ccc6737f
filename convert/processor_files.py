"""What transformers' `AutoProcessor` reads beside the weights, for sources that have none of it.

The original layout and the native one need a tokenizer alone; `CsmProcessor` also wants special
tokens with names, a chat template, and a description of the audio.
"""

import json
import logging
from pathlib import Path
from typing import Any

import tokenizers

from csm_jax.config import CSMConfig
from csm_jax.convert.sentencepiece_files import to_tokenizers
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.tokenizer import Tokenizer

# A turn is BOS, "[speaker]text" or "[speaker] text", EOS, and its audio frames, if it has some.
_TEMPLATE = """\
{%- for message in messages -%}
  {%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | list -%}
  {%- if texts | length != 1 -%}
    {{- raise_exception('every message needs one item of type text') -}}
  {%- endif -%}
  {{- BOS + '[' + message['role'] + TEXT + EOS -}}
  {%- for item in message['content'] if item['type'] == 'audio' -%}
    {{- AUDIO -}}
  {%- endfor -%}
{%- endfor -%}
"""
# As `prompt.turns.tagged_text`.
_TEXT = "']' + texts[0]['text']"
_TEXT_AFTER_SPACE = "'] ' + texts[0]['text'].lstrip()"
# Names of the special tokens in the published tokenizer.
_NAMES = ("<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>")
# Texts that the written tokenizer must encode as the source's does.
_PROBES = (
    "[0]Hello from Sesame.",
    "[0] Hello from Miso.",
    "[1]One, two; three! Is it 4:05 p.m.? It's $6.70, (or 8%).",
    "  two  spaces\tand\na line ",
    "Grüße, señor Ångström \u2014 \u201c\ufb01n\u201d \u2026",
    "\u4f60\u597d \u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439 \U0001f600",
    "",
)

logger = logging.getLogger("csm_jax")


def write_processor(directory: Path, config: CSMConfig, tokenizer: Tokenizer) -> None:
    """Adds those of the processor's files that a directory lacks.

    A tokenizer that has no equal in transformers' form is left out with a notice.

    Args:
      directory: of an export, with the tokenizer's own file.
    """
    _write(directory / "generation_config.json", _generation(config))
    values = _tokenizer(directory)
    before = json.dumps(values)
    special = _add_special(values, config, tokenizer) if values else None
    if values is None or special is None or not _is_equal(values, tokenizer):
        logger.warning(
            "%s has no equal in transformers' form: AutoProcessor does not load this export",
            tokenizer.file_name,
        )
        return
    bos, eos, audio, audio_eos = special
    spoken = _TEXT_AFTER_SPACE if config.space_after_speaker else _TEXT
    template = _TEMPLATE.replace(" TEXT ", f" {spoken} ")
    for name, text in (("BOS", bos), ("EOS", eos), ("AUDIO", audio + audio_eos)):
        template = template.replace(f" {name} ", f" {json.dumps(text)} ")
    file = directory / "tokenizer.json"
    if json.dumps(values) != before or not file.exists():  # else it stays as it is, to the byte
        file.write_text(json.dumps(values, ensure_ascii=False))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": audio,
        "extra_special_tokens": {"audio_token": audio, "audio_eos_token": audio_eos},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write(directory / "tokenizer_config.json", names)
    _write(directory / "preprocessor_config.json", _feature_extractor(config))
    has_template = (directory / "chat_template.json").exists()
    if not has_template and not (directory / "chat_template.jinja").exists():
        (directory / "chat_template.jinja").write_text(template)


def _generation(config: CSMConfig) -> dict[str, Any]:
    """The defaults of `generate`; without them transformers stops after 20 positions."""
    sampling, num_more = Sampling(), config.num_codebooks - 1
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
    depth = drawn | {"min_new_tokens": num_more, "max_new_tokens": num_more}
    return {
        **drawn,
        **{f"depth_decoder_{name}": value for name, value in depth.items()},
        "max_new_tokens": int(config.default_max_audio_length_ms / config.frame_ms),
        "bos_token_id": config.text_token_ids.bos,
        "pad_token_id": config.text_token_ids.audio,
    }


def _feature_extractor(config: CSMConfig) -> dict[str, Any]:
    return {
        "processor_class": "CsmProcessor",
        "feature_extractor_type": "EncodecFeatureExtractor",
        "feature_size": config.codec.channels,
        "sampling_rate": config.codec.sample_rate,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "chunk_length_s": None,
        "overlap": None,
    }


def _write(file: Path, values: dict[str, Any]) -> None:
    if not file.exists():
        file.write_text(json.dumps(values, indent=2) + "\n")


def _tokenizer(directory: Path) -> dict[str, Any] | None:
    """The tokenizer in the form of `tokenizer.json`; None if it cannot be written so."""
    file = directory / "tokenizer.json"
    if file.exists():
        return json.loads(file.read_text())
    return to_tokenizers((directory / "tokenizer.model").read_bytes())


def _add_special(
    values: dict[str, Any], config: CSMConfig, tokenizer: Tokenizer
) -> list[str] | None:
    """Makes BOS, EOS and the two audio tokens special; returns their texts, or None if it cannot.

    Ids that have a token keep it; others get the published name.
    """
    ids = config.text_token_ids
    added = {token["id"]: token for token in values.get("added_tokens") or []}
    vocab = values["model"]["vocab"]
    by_id = _texts(vocab) | {number: token["content"] for number, token in added.items()}
    texts = []
    wanted = (tokenizer.bos, tokenizer.eos, ids.audio, ids.audio_eos)
    for number, name in zip(wanted, _NAMES, strict=True):
        text = by_id.setdefault(number, name)
        texts.append(text)
        if number not in added:
            _add(vocab, text, number)
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added[number] = {"id": number, "content": text, **flags, "special": True}
    values["added_tokens"] = [added[number] for number in sorted(added)]
    return texts if len({*texts}) == len(texts) else None


def _texts(vocab: dict[str, int] | list[list[Any]]) -> dict[int, str]:
    """The texts of a vocabulary by their ids; a Unigram model has a list of texts and scores."""
    if isinstance(vocab, list):
        return {i: text for i, (text, _) in enumerate(vocab)}
    return {number: text for text, number in vocab.items()}


def _add(vocab: dict[str, int] | list[list[Any]], text: str, number: int) -> None:
    """Gives an id a text."""
    if isinstance(vocab, dict):
        vocab[text] = number
        return
    worst = min(score for _, score in vocab)
    vocab += [[f"<|unused_{i}|>", worst] for i in range(len(vocab), number + 1)]
    vocab[number][0] = text


def _is_equal(values: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether the written form gives the ids of the source's tokenizer."""
    written = tokenizers.Tokenizer.from_str(json.dumps(values))
    written.no_truncation()
    return all(
        [tokenizer.bos, *written.encode(text, add_special_tokens=False).ids, tokenizer.eos]
        == tokenizer.encode(text)
        for text in _PROBES
    )
