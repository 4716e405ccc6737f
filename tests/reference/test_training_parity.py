"""Losses, gradients and adapters against transformers and PEFT."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import fixtures
import torch
import transformers

import csm_jax
import oracles
from csm_jax import finetune
from csm_jax.checkpoints import native_format, peft_files
from csm_jax.convert import __main__ as convert
from csm_jax.convert import csm
from csm_jax.convert.layouts import open_checkpoint
from csm_jax.model import lora
from csm_jax.model.lora import LoRAConfig
from csm_jax.model.precision import FLOAT32
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.turns import text_rows
from csm_jax.train.batches import Batch
from csm_jax.train.loss import choose_frames
from csm_jax.train.optimizer import OptimizerConfig
from csm_jax.train.step import TrainStepConfig, losses, mean_losses

CONFIG = csm_jax.tiny()
TABLE = csm.huggingface_table(CONFIG.backbone, CONFIG.depth_decoder)
# Two conversations of text and audio, unequally long.
PROMPTS = [
    oracles.random_prompt(CONFIG, seed=1, num_ids=4, context=[(5, 11), (3, 17)]),
    oracles.random_prompt(CONFIG, seed=2, num_ids=1, context=[(2, 6)]),
]
IGNORED = -100


@pytest.fixture(scope="module")
def reference():
    return oracles.hf_model(CONFIG, seed=3)


@pytest.fixture(scope="module")
def params(reference, tmp_path_factory):
    directory = oracles.save_hf(reference, tmp_path_factory.mktemp("hf") / "model")
    return fixtures.params_of(open_checkpoint(directory), FLOAT32)["csm"]


def padded_batch(trained: str) -> Batch:
    """The prompts, padded; the loss counts all audio, or in the first row only its second turn."""
    length = max(len(frames) for frames, _ in PROMPTS) + 3
    rows = [
        [np.pad(np.asarray(x), ((0, length - len(x)), (0, 0))) for x in prompt]
        for prompt in PROMPTS
    ]
    frames, mask = (np.stack(arrays) for arrays in zip(*rows, strict=True))
    loss_mask = mask[..., 0].copy()
    if trained == "one turn":
        first = np.flatnonzero(loss_mask[0])
        loss_mask[0, first[first < first[0] + 12]] = False
    return Batch(frames.astype(np.int32), mask, loss_mask)


def config_of(
    share: float, weight: float = 1.0, adapters: LoRAConfig | None = None
) -> TrainStepConfig:
    return TrainStepConfig(
        CONFIG,
        OptimizerConfig(),
        FLOAT32,
        lora=adapters,
        depth_share=share,
        depth_weight=weight,
        remat=True,
    )


def keys_of(batch: Batch):
    return jax.vmap(jax.random.key)(jnp.arange(len(batch.frames), dtype=jnp.uint32))


def our_loss(params, batch, config, frozen=None):
    """Loss, its two parts, and gradients."""
    (whole, parts), gradients = _differentiate(params, frozen, batch, config=config)
    return whole, parts, gradients


@functools.partial(jax.jit, static_argnames="config")
def _differentiate(params, frozen, batch, *, config):
    def loss(params):
        backbone, depth = mean_losses(losses(params, frozen, batch, keys_of(batch), config=config))
        return backbone + config.depth_weight * depth, (backbone, depth)

    return jax.value_and_grad(loss, has_aux=True)(params)


def their_loss(model, batch: Batch, share: float):
    """transformers' loss of the same rows, whose labels are the frames that count."""
    chosen, counts = choose_frames(jnp.asarray(batch.loss_mask), share, keys_of(batch))
    labels = np.where(batch.loss_mask[..., None], batch.frames[..., :-1], IGNORED)
    for row, (positions, count) in enumerate(zip(chosen, counts, strict=True)):
        others = np.setdiff1d(np.arange(labels.shape[1]), np.asarray(positions)[np.asarray(count)])
        labels[row, others, 1:] = IGNORED
    embeds = torch.stack(
        [oracles.hf_embed(model, prompt) for prompt in zip(batch.frames, batch.mask, strict=True)]
    )
    return model(inputs_embeds=embeds, labels=torch.from_numpy(labels).long())


def relative_error(ours, theirs) -> float:
    theirs = np.asarray(theirs)
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("trained", ["everything", "one turn"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_losses_and_gradients(reference, params, trained, share):
    batch = padded_batch(trained)
    whole, (backbone, depth), gradients = our_loss(params, batch, config_of(share))
    reference.zero_grad()
    theirs = their_loss(reference, batch, share)
    theirs.loss.backward()
    assert whole == pytest.approx(theirs.loss.item(), rel=1e-4)
    assert backbone == pytest.approx(theirs.backbone_loss.item(), rel=1e-4)
    assert depth == pytest.approx(theirs.depth_decoder_loss.item(), rel=1e-4)
    # Every table of conversion is linear, so gradients go through it as weights do.
    flat = {path: np.asarray(array) for path, array in native_format.flatten(gradients).items()}
    compared = 0
    for name, gradient in fixtures.written(TABLE, flat).items():
        parameter = reference.get_parameter(name)
        assert relative_error(gradient, parameter.grad) < 1e-4, name
        compared += parameter.numel()
    codec = sum(p.numel() for p in reference.codec_model.parameters())
    assert compared == sum(p.numel() for p in reference.parameters()) - codec


def test_the_weight_of_the_depth_decoder(reference, params):
    batch = padded_batch("everything")
    theirs = their_loss(reference, batch, 1.0)
    whole, _, _ = our_loss(params, batch, config_of(1.0, weight=0.3))
    want = theirs.backbone_loss + 0.3 * theirs.depth_decoder_loss
    assert whole == pytest.approx(want.item(), rel=1e-4)


def peft_model(model, config: LoRAConfig):
    peft = pytest.importorskip("peft")
    names = {"projection": "inputs_embeds_projector", "codebook0_head": "lm_head"}
    modules = [names.get(target, f"{target}_proj") for target in config.targets]
    # Only of the language model: the codec has projections of the same names.
    pattern = rf"(?!codec_model).*\.?({'|'.join(modules)})"
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=pattern)
    adapted = peft.get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


@pytest.fixture(params=[lora.TARGETS, ("q", "v")], ids="-".join)
def adapted(request, tmp_path):
    """A saved PEFT model with random adapters, and the adapters that are read from its files."""
    config = LoRAConfig(rank=3, alpha=5.0, targets=request.param)
    model = peft_model(oracles.hf_model(CONFIG, seed=3), config)
    model.save_pretrained(tmp_path)
    adapters, scale = peft_files.read_adapters(tmp_path, CONFIG)
    assert scale == pytest.approx(config.scale)
    assert adapters.keys() == lora.adapter_shapes(CONFIG, config.targets).keys()
    return model, adapters, config, tmp_path


def test_gradients_of_adapters_equal_those_of_peft(adapted, params):
    model, adapters, config, _ = adapted
    batch = padded_batch("everything")
    whole, _, gradients = our_loss(adapters, batch, config_of(0.5, adapters=config), params)
    theirs = their_loss(model.base_model.model, batch, 0.5)
    theirs.loss.backward()
    assert whole == pytest.approx(theirs.loss.item(), rel=1e-4)
    grads = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert len(grads) == 2 * len(gradients)
    for path, low in gradients.items():
        for half, ours in (("A", low.down), ("B", low.up)):
            name = f"base_model.model.{peft_files._peft_name(path)}.lora_{half}.default.weight"
            assert relative_error(ours, grads[name]) < 1e-4, name


def test_merged_adapters_are_the_adapted_model(adapted, params):
    """PEFT's own merge, read as any checkpoint, is ours."""
    model, _, _, directory = adapted
    ours = dict(peft_files.merge_files(flat_items(params), CONFIG, directory, is_int8=False))
    merged = model.merge_and_unload()
    for name, tensor in fixtures.written(TABLE, fixtures.section("csm/", ours)).items():
        theirs = merged.get_parameter(name).detach().numpy()
        np.testing.assert_allclose(tensor, theirs, rtol=1e-5, atol=1e-6, err_msg=name)


def flat_items(params):
    flat = native_format.flatten({"csm": params})
    return ((path, np.asarray(array)) for path, array in flat.items())


def test_peft_loads_written_adapters(adapted, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapters, config, _ = adapted
    peft_files.write_adapters(tmp_path / "ours", adapters, config, "someone/base@v2")
    settings = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    assert (settings.base_model_name_or_path, settings.revision) == ("someone/base", "v2")
    fresh = oracles.hf_model(CONFIG, seed=3)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    batch = padded_batch("everything")
    with torch.no_grad():
        theirs = their_loss(model.base_model.model, batch, 1.0).loss
        got = their_loss(loaded.base_model.model, batch, 1.0).loss
        before = their_loss(oracles.hf_model(CONFIG, seed=3), batch, 1.0).loss
    assert got == pytest.approx(theirs.item(), rel=1e-6)
    assert abs(before - theirs) > 1e-3


def test_a_finetuned_model_generates_the_same_codes_in_transformers(tmp_path):
    """It is converted, and sampled greedily on both sides."""
    data, out, exported = fixtures.write_conversations(tmp_path), tmp_path / "run", tmp_path / "hf"
    flags = ["--checkpoint=random:tiny", f"--data={data}", f"--out={out}", "--max_len=512"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert finetune.run([*flags, "--steps=5", "--learning_rate=1e-2"]) == 0
    assert convert.run([f"--source={out / 'model'}", f"--out={exported}", "--to=hf"]) == 0
    load = transformers.CsmForConditionalGeneration.from_pretrained
    reference = load(exported, dtype=torch.float32).eval()
    model = csm_jax.load(out / "model")
    prompt = text_rows("say this", 1, CONFIG, model.tokenizer)
    theirs = oracles.hf_greedy(reference, prompt, 20)
    assert oracles.greedy_margin(reference, prompt, theirs) > 1e-4
    ours = fixtures.generate(CONFIG, model.params, [prompt], [Sampling(greedy=True)], [0], 20)[0]
    np.testing.assert_array_equal(ours, fixtures.up_to_the_end(theirs.numpy()))
