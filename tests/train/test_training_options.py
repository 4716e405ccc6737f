"""What is trained, by which settings, and where the result is published."""

import inspect
import json
from pathlib import Path

import fixtures
import huggingface_hub
import jax
import numpy as np
import pytest
from absl import flags
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.numpy import load_file

import csm_jax
from csm_jax import finetune
from csm_jax.checkpoints import native_format
from csm_jax.cli import training_flags
from csm_jax.model.precision import FLOAT32, resolve, role_of
from csm_jax.train.batches import Batch
from csm_jax.train.loop import RunConfig
from csm_jax.train.optimizer import OptimizerConfig
from csm_jax.train.parts import GROUPS, PARTS, split
from csm_jax.train.presets import PRESETS
from csm_jax.train.pretrained import load_pretrained, merge_trained
from csm_jax.train.publish import make_card, publish
from csm_jax.train.step import TrainStepConfig, init_state, train_step

CONFIG = csm_jax.tiny()
COMMON = ["--checkpoint=random:tiny", "--batch_size=2", "--max_len=512", "--steps=2"]
COMMON += ["--learning_rate=0.05", "--warmup=0", "--eval_every=0", "--weight_decay=0.5"]

pytestmark = pytest.mark.usefixtures("lenient")


class Hub:
    """The part of `huggingface_hub.HfApi` that publishing needs; it keeps what is uploaded."""

    files: dict[str, bytes]
    has_token = has_network = True

    def __call__(self):
        return self

    def whoami(self):
        if not self.has_token:
            raise LocalTokenNotFoundError("Token is required")

    def model_info(self, name, revision=None):
        data = huggingface_hub.ModelCardData(license="mit")
        return type("Info", (), {"card_data": data})

    def create_repo(self, name, private, exist_ok):
        self.repository = name, private, exist_ok
        return f"https://huggingface.co/{name}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        if not self.has_network:
            raise ConnectionError("502 Bad Gateway")
        paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        self.files = {str(path.relative_to(folder_path)): path.read_bytes() for path in paths}

    def download(self, directory: Path) -> Path:
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        return directory


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    for name in ("whoami", "model_info", "create_repo", "upload_folder"):
        real = getattr(huggingface_hub.HfApi, name)
        monkeypatch.setattr(hub, name, called_like(real, getattr(hub, name)))
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


def called_like(real, method):
    """The method, which takes only calls that fit the real one."""

    def call(*args, **kwargs):
        inspect.signature(real).bind(None, *args, **kwargs)
        return method(*args, **kwargs)

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fixtures.write_conversations(tmp_path_factory.mktemp("data"), lengths=[(3, 2), (4,)])


def run(data: Path, out: Path, *arguments: str) -> int:
    return finetune.run([*COMMON, f"--data={data}", f"--out={out}", *arguments])


@pytest.fixture(scope="module")
def partial_run(data, tmp_path_factory):
    """A run that trains the depth decoder and the heads."""
    out = tmp_path_factory.mktemp("partial") / "run"
    assert run(data, out, "--train=depth_decoder,heads", "--codebook_weights=1,2") == 0
    return out


def part_of(path: str) -> str:
    return path.split("/")[1]


def test_parts_are_the_sections_of_the_parameters():
    shapes = native_format.param_shapes(CONFIG)["csm"]
    assert set(PARTS) == set(shapes)
    assert set().union(*GROUPS.values()) == set(PARTS)


def test_parts_that_are_not_trained_are_equal_to_the_bit(partial_run):
    ours = dict(native_format.read_params(partial_run / "model", CONFIG))
    base = native_format.flatten({"csm": csm_jax.load("random:tiny").params})
    changed = {part_of(path) for path, leaf in base.items() if not np.array_equal(ours[path], leaf)}
    assert changed == {"depth_decoder", "codebook0_head", "depth_heads"}
    trained = [path for path in base if part_of(path) in changed]
    assert not any(np.array_equal(ours[path], base[path]) for path in trained)


def test_parts_that_are_not_trained_take_no_memory_of_the_optimizer(partial_run):
    """A checkpoint has parameters and two moments of them, and a few numbers."""
    checkpoint = partial_run / "checkpoints" / "2" / "state"
    stored = json.loads((checkpoint / "_METADATA").read_text())["tree_metadata"]
    paths = [[each["key"] for each in leaf["key_metadata"]] for leaf in stored.values()]
    sections = {part for path in paths for part in path if part in PARTS}
    assert sections == {"depth_decoder", "codebook0_head", "depth_heads"}
    params = [path for path in paths if path[0] == "params"]
    moments = [path for path in paths if path[0] != "params" and set(path) & sections]
    assert len(moments) == 2 * len(params) > 20


def test_the_logged_loss_has_the_weights_of_the_codebooks(partial_run):
    """Without a share for the depth decoder of 1, only evaluation is exact: `test_step.py`."""
    line = json.loads((partial_run / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(line["backbone_loss"] + 2 * line["depth_loss"], rel=1e-5)


def test_adapters_lie_only_in_the_parts_that_are_trained(data, tmp_path, hub):
    """And they are what is uploaded, with a card."""
    out = tmp_path / "run"
    arguments = ["--lora_rank=2", "--train=depth_decoder,heads", "--push_to_hub=me/voice"]
    arguments += ["--lora_targets=q,down,codebook0_head"]
    assert run(data, out, *arguments) == 0
    tensors = load_file(out / "adapters" / "adapter_model.safetensors")
    assert len(tensors) == 2 * (2 * CONFIG.depth_decoder.num_layers + 1)
    assert not any("backbone" in name for name in tensors)
    assert hub.repository == ("me/voice", True, True)
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert (out / "adapters" / "adapter_model.safetensors").read_bytes() == hub.files[
        "adapter_model.safetensors"
    ]
    assert b"`train` | depth_decoder, heads |" in hub.files["README.md"]
    assert str(tmp_path).encode() not in hub.files["README.md"]
    assert not list(out.glob(".hub*"))


def test_a_model_is_uploaded_as_transformers_has_it(partial_run, tmp_path, hub):
    settings = json.loads((partial_run / "run.json").read_text())
    address = publish(partial_run, partial_run / "model", "me/model", settings)
    assert address == "https://huggingface.co/me/model"
    ours = csm_jax.load(hub.download(tmp_path)).params
    want = csm_jax.load(partial_run / "model").params
    fixtures.assert_same_params(native_format.flatten(ours), native_format.flatten(want))
    card = huggingface_hub.ModelCard(hub.files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert 'csm_jax.load("me/model")' in card.text


def test_the_card_says_what_was_trained_and_how_to_load_it():
    settings = {"checkpoint": "sesame/csm-1b@main", "lora_rank": 32, "data": "/home/me/secret"}
    metrics = [{"step": 1, "loss": 9.0, "eval_loss": 8.5}, {"step": 2, "loss": 7.25}]
    card = huggingface_hub.ModelCard(
        make_card("me/voice", "sesame/csm-1b@main", "apache-2.0", settings, metrics)
    )
    assert card.data.base_model == "sesame/csm-1b"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-to-speech"
    assert 'csm_jax.load("sesame/csm-1b@main", adapters="me/voice")' in card.text
    assert "| `lora_rank` | 32 |" in card.text
    assert "`loss` 7.250 and `eval_loss` 8.500" in card.text
    assert "secret" not in card.text
    validated = huggingface_hub.ModelCard(card.content)
    assert validated.data.tags == ["csm", "csm-jax", "text-to-speech", "lora"]


def test_a_hub_that_is_not_there_is_one_line(partial_run, data, tmp_path, hub, capsys):
    hub.has_token = False
    assert run(data, tmp_path / "run", "--push_to_hub=me/voice") == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    hub.has_token, hub.has_network = True, False
    with pytest.raises(csm_jax.CSMError, match=r"could not be uploaded to me/voice .*502"):
        publish(partial_run, partial_run / "model", "me/voice", {"checkpoint": "demo"})
    assert (partial_run / "model" / "config.json").is_file()


def parsed(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    training_flags.define_flags(values)
    values(["finetune", *arguments])
    training_flags.apply_preset(values)
    return values


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_values_of_flags_that_fit_together(name):
    values = parsed(f"--preset={name}", "--data=x", "--out=y")
    training_flags.check(values)
    settings = training_flags.read_settings(values)
    for flag, value in PRESETS[name].values.items():
        assert type(values[flag].value) is type(value)
        assert settings.get(flag, values[flag].default) == value


def test_flags_that_are_given_replace_those_of_a_preset(capsys):
    values = parsed("--steps=7", "--optimiser=muon", "--preset=unsloth")
    assert (values.steps, values.optimizer, values.lora_rank) == (7, "muon", 32)
    assert training_flags.read_lora(values).scale == 1
    printed = capsys.readouterr().err
    assert printed.startswith("--preset=unsloth (github.com/unslothai/notebooks")
    assert "--learning_rate=0.0002" in printed
    assert "--steps" not in printed
    settings = training_flags.read_settings(values)
    assert settings["preset"] == "unsloth"
    assert (settings["decay"], settings["warmup"], settings["lora_alpha"]) == ("linear", 5, 32.0)


def test_settings_without_new_options_are_those_of_earlier_versions():
    settings = training_flags.read_settings(parsed())
    new = {"preset", "train", "codebook_weights", "decay", "final_rate", "beta2", "push_to_hub"}
    assert not new & settings.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--train=decoder"],
            "decoder is no part of the model that can be trained: ",
        ),
        (["--train="], "no part is trained"),
        (["--train=heads", "--from_scratch"], "--from_scratch trains everything"),
        (["--train=heads", "--guided_heads=0.0"], "which --train leaves out"),
        (["--train=backbone,heads", "--lora_rank=2"], "--train has heads, which has no adapters"),
        (["--preset=mine"], "there is no preset mine: there are unsloth,"),
        (["--codebook_weights=1,a"], "--codebook_weights is a, expected a number"),
        (["--codebook_weights=0"], "codebook_weights is 0, but must be"),
        (["--codebook_weights=" + ",".join("1" * 99)], "99 weights"),
        (["--decay=steep"], "decay is steep"),
        (["--push_to_hub=voice"], "must be OWNER/NAME"),
        (["--push_to_hub=a/b/c"], "--push_to_hub is a/b/c"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, data, tmp_path, capsys):
    assert run(data, tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("csm_jax.finetune: error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_the_flags_of_a_run_have_the_defaults_of_its_configs():
    values = parsed()
    assert training_flags.read_run(values) == RunConfig()
    optimizer = OptimizerConfig(learning_rate=3e-5, warmup=50)
    config = training_flags.read_step(values, CONFIG, FLOAT32, None)
    assert config == TrainStepConfig(CONFIG, optimizer, FLOAT32)
    np.testing.assert_allclose(config.loss_weights.sum(), 2, rtol=1e-6)


def test_frozen_parts_are_those_of_the_checkpoint_in_narrow_types():
    """On a CPU tables would be held as bits, which are no part of a result."""
    base = native_format.flatten(load_pretrained("random:tiny", FLOAT32, None).params)
    narrow = resolve("bfloat16")
    assert narrow.packs_tables
    pretrained = load_pretrained("random:tiny", narrow, None, trained={"projection"})
    trained, frozen = split(pretrained.params, pretrained.trained)
    assert trained["projection"]["weight"].dtype == np.float32
    merged = dict(merge_trained(pretrained, jax.device_get(trained), None))
    for path, leaf in native_format.flatten(frozen).items():
        want = base[path].astype(narrow.dtype_of(role_of(f"csm/{path}")))
        np.testing.assert_array_equal(leaf, want, path)
        assert merged[f"csm/{path}"].dtype == want.dtype


def test_training_is_in_float32_where_inference_is_in_float16(data, tmp_path, monkeypatch):
    """Gradients fall out of the range of float16, as on a T4."""
    found = []

    def stop(name, precision, *_, **__):
        found.append(precision)
        raise csm_jax.InputError("stop")

    monkeypatch.setattr("csm_jax.model.precision._best_dtype", lambda *_: "float16")
    monkeypatch.setattr(finetune, "load_pretrained", stop)
    assert run(data, tmp_path / "run") == 2
    assert found == [FLOAT32]


@pytest.mark.long
def test_without_the_backbone_there_is_no_backward_pass_through_it():
    """Its products are then those of the forward pass alone."""

    def count_products(parts: set[str]) -> int:
        params = load_pretrained("random:tiny", FLOAT32, None).params
        config = TrainStepConfig(CONFIG, OptimizerConfig(), FLOAT32, remat=False)
        trained, frozen = split(params, parts)
        columns = CONFIG.num_codebooks + 1
        frames = np.zeros((2, 16, columns), np.int32)
        mask = np.ones(frames.shape, bool)
        batch = Batch(frames, mask, mask[..., 0])
        state = jax.eval_shape(lambda params: init_state(params, config), trained)
        lowered = train_step.lower(state, frozen or None, batch, np.uint32(0), config=config)
        return lowered.as_text().count("dot_general")

    decoder = {"projection", "depth_decoder", "depth_heads"}
    saved = count_products(set(PARTS)) - count_products(decoder)
    # Two gradients of each product of a layer: of its input and of its weight.
    assert saved >= 2 * 5 * CONFIG.backbone.num_layers
