"""Uploads the result of a run to the Hugging Face hub, with a model card."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from csm_jax.checkpoints import native_format, peft_files
from csm_jax.convert.export import export_huggingface
from csm_jax.errors import CSMError, InputError, first_line
from csm_jax.loading import BUNDLED, hub
from csm_jax.prompt.tokenizer import load_tokenizer
from csm_jax.train.log import read_metrics

CARD = "README.md"
# Paths of this machine, and what has nothing to do with the result.
_PRIVATE = {"data", "eval_data", "checkpoint", "adapters", "on_bad_data"}
_FAILURES = (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError)


def check_name(name: str) -> None:
    """Raises `InputError` for what is no name of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push_to_hub is {name}: {first_line(error)}") from error
    if "/" not in name:
        raise InputError(f"--push_to_hub is {name}, but must be OWNER/NAME")


def check_login() -> None:
    """Raises `InputError` if the hub does not know the user, which is better seen before a run."""
    try:
        huggingface_hub.HfApi().whoami()
    except _FAILURES as error:
        raise InputError(
            f"--push_to_hub: the hub does not know you ({first_line(error)}): log in with "
            "`hf auth login`, or set HF_TOKEN"
        ) from error


def publish(out: Path, result: Path, name: str, settings: Mapping[str, Any]) -> str:
    """Uploads adapters in PEFT's format, or a model in that of transformers.

    Both are what `csm_jax.load` reads by their name. A new repository is private.

    Args:
      out: the directory of the run.
      result: of `result.write_result`.
      name: of the repository, OWNER/NAME.
      settings: the flags of the run.

    Returns:
      The address of the repository.

    Raises:
      CSMError: it could not be uploaded; the result is still there.
    """
    api = huggingface_hub.HfApi()
    base = str(settings["checkpoint"])
    try:
        with _folder(out, result) as folder:
            card = make_card(name, base, find_license(api, base), settings, read_metrics(out))
            (folder / CARD).write_text(card, encoding="utf-8")
            address = api.create_repo(name, private=True, exist_ok=True)
            api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=f"Fine-tuned from {base}"
            )
    except _FAILURES as error:
        raise CSMError(
            f"{result} is complete, but could not be uploaded to {name} ({first_line(error)}): the "
            "same command tries again"
        ) from error
    return str(address)


@contextlib.contextmanager
def _folder(out: Path, result: Path) -> Iterator[Path]:
    """A temporary directory with the files to upload."""
    with tempfile.TemporaryDirectory(prefix=".hub.", dir=out) as temporary:
        folder = Path(temporary) / result.name
        if peft_files.is_adapters(result):
            folder.mkdir()
            for file in result.iterdir():
                (folder / file.name).hardlink_to(file)
        else:
            config = native_format.load_config(result)
            tensors = native_format.read_params(result, config)
            tokenizer = load_tokenizer(result, config)
            small_files = native_format.small_files(result)
            export_huggingface(config, tensors, tokenizer, small_files, folder)
        yield folder


def find_license(api: huggingface_hub.HfApi, base: str) -> str | None:
    """The license of the model that was trained, as its card has it; None if nothing is known."""
    if base in BUNDLED:
        return "apache-2.0"
    if Path(base).exists() or not hub.is_name(base):
        return None
    name, _, revision = base.partition("@")
    card = api.model_info(name, revision=revision or None).card_data
    return None if card is None else card.get("license")


def make_card(
    name: str,
    base: str,
    license_name: str | None,
    settings: Mapping[str, Any],
    metrics: list[dict[str, Any]],
) -> str:
    """The model card: what it was made of, how to load it, and the settings of its training.

    Args:
      base: the checkpoint that was trained.
      license_name: of that checkpoint.
      metrics: the lines of `metrics.jsonl`.
    """
    is_lora = bool(settings.get("lora_rank"))
    repository = base.partition("@")[0]
    is_public = hub.is_name(base) and not Path(base).exists()
    shown = (
        f"[{repository}](https://huggingface.co/{repository})" if is_public else f"`{_own(base)}`"
    )
    kind = "LoRA adapters for" if is_lora else "A fine-tuned copy of"
    data = huggingface_hub.ModelCardData(
        base_model=repository if is_public else None,
        license=license_name,
        library_name="peft" if is_lora else "transformers",
        pipeline_tag="text-to-speech",
        tags=["csm", "csm-jax", "text-to-speech", *["lora"] * is_lora],
    )
    terms = f"The license of {shown} holds"
    terms += f" ({license_name})." if license_name else ", as far as it is known to you."
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name.partition('/')[2]}",
        f"{kind} {shown}, trained with csm-jax.",
        f"## How to load it\n\n```python\n{_loading(name, base, is_lora)}\n```",
        f"## Training\n\n{_losses(metrics)}{_table(settings)}",
        f"## Terms\n\n{terms} Do not imitate people who have not agreed to it, and say of speech "
        "that you publish that it was generated.",
    ]
    return "\n\n".join(sections) + "\n"


def _own(base: str) -> str:
    """The name of a checkpoint of this machine without its path."""
    return Path(base).name if Path(base).exists() else base


def _loading(name: str, base: str, is_lora: bool) -> str:
    arguments = f'"{_own(base)}", adapters="{name}"' if is_lora else f'"{name}"'
    return (
        f"import csm_jax\n\nmodel = csm_jax.load({arguments})\n"
        'audio = model.generate("Hello.", speaker=0)  # float32, 24 kHz'
    )


def _losses(metrics: list[dict[str, Any]]) -> str:
    """The last losses, in nats a code."""
    found = {}
    for line in metrics:
        found |= {key: line[key] for key in ("loss", "eval_loss") if line.get(key) is not None}
    if not found:
        return ""
    listed = " and ".join(f"`{key}` {value:.3f}" for key, value in found.items())
    return f"The last losses were {listed} (nats, backbone and depth decoder).\n\n"


def _table(settings: Mapping[str, Any]) -> str:
    rows = ["| setting | value |", "|---|---|"]
    for key, value in settings.items():
        if key not in _PRIVATE and value not in (None, [], False):
            listed = ", ".join(map(str, value)) if isinstance(value, list) else value
            rows.append(f"| `{key}` | {listed} |")
    return "\n".join(rows)
