"""Flags, manifests and schemas have the fields, types and defaults of the dataclasses."""

import dataclasses
from pathlib import Path

import pytest
from absl import flags

from csm_jax import Request, Sampling, generate
from csm_jax.cli import dataclass_flags, manifest
from csm_jax.cli.dataclass_flags import define_flags, field_descriptions, field_types, read_flags
from csm_jax.inference.engine_config import EngineConfig

settings = pytest.importorskip("csm_jax.serve.settings")
serve = pytest.importorskip("csm_jax.serve.__main__")


@dataclasses.dataclass
class Example:
    """An example.

    Attributes:
      count: a number of things,
        on two lines.
      share, limit: two numbers.
      path: a file: any.

    Raises:
      Nothing: at all.
    """

    count: int
    share: float = 0.5
    limit: float | None = None
    path: Path | None = None
    names: tuple[str, ...] = ("a", "b")
    mode: str | bool = "on"
    is_on: bool = False


def parsed(cls: type, *argv: str, **options: object) -> dict:
    values = flags.FlagValues()
    define_flags(values, cls, **options)
    values(["program", *argv])
    return read_flags(values, cls, options.get("names"))


def test_flags_without_arguments_are_the_defaults():
    names = [field.name for field in dataclasses.fields(Example)][1:]
    assert Example(count=1, **parsed(Example, names=names)) == Example(1)
    assert Sampling(**parsed(Sampling)) == Sampling()


def test_values_have_the_types_of_the_fields():
    given = parsed(
        Example, "--count=3", "--limit=2", "--path=x", "--names=c", "--is_on", "--mode=a"
    )
    assert given == dict(
        count=3, share=0.5, limit=2.0, path=Path("x"), names=("c",), mode="a", is_on=True
    )
    assert type(given["limit"]) is float


def test_an_empty_path_is_none():
    assert parsed(Example, "--path=")["path"] is None


def test_a_value_below_its_bound_is_refused():
    with pytest.raises(flags.Error, match="count"):
        parsed(Example, "--count=0", lower_bounds={"count": 1})


def test_a_type_without_a_kind_of_flag_is_an_error():
    with pytest.raises(KeyError):
        define_flags(flags.FlagValues(), dataclasses.make_dataclass("Odd", [("odd", bytes)]))


def test_descriptions_are_those_of_the_docstring():
    assert field_descriptions(Example) == {
        "count": "a number of things, on two lines",
        "share": "two numbers",
        "limit": "two numbers",
        "path": "a file: any",
    }
    assert field_descriptions(dataclasses.make_dataclass("Bare", [("a", int)])) == {}


@pytest.mark.parametrize("cls", [Sampling, Request, EngineConfig, settings.Settings])
def test_every_field_of_the_public_dataclasses_is_described(cls):
    assert field_descriptions(cls).keys() == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("command", [generate, serve])
def test_commands_have_a_flag_for_every_field_of_sampling(command):
    values = flags.FlagValues()
    command.define_flags(values)
    for field in dataclasses.fields(Sampling):
        flag = values[field.name]
        assert flag.value == field.default
        assert flag.help == field_descriptions(Sampling)[field.name]


def test_a_manifest_line_takes_every_field_of_sampling():
    assert manifest._SAMPLING_FIELDS.keys() == field_types(Sampling).keys()


def test_a_manifest_line_takes_every_field_of_a_request_that_is_not_made_of_others():
    known = manifest._REQUEST_FIELDS.keys() - {"id"}
    assert field_types(Request).keys() - known == {
        "sampling",
        "shared_turns",
        "pauses",
        "interventions",
        "voice",
        "rank",
    }


def test_the_server_has_a_flag_for_every_setting_that_is_not_made_of_others():
    values = flags.FlagValues()
    serve.define_flags(values)
    missing = field_types(settings.Settings).keys() - set(values)
    assert missing == {"sampling", "api_keys", "webhook_secret", "limits"}
    names = [*serve.ENGINE_FLAGS, *serve.SETTINGS_FLAGS]
    defaults = settings.Settings(**read_flags(values, settings.Settings, names))
    assert defaults == settings.Settings()


def test_the_server_has_the_sizes_of_an_engine():
    values = flags.FlagValues()
    serve.define_flags(values)
    sizes = read_flags(values, EngineConfig, serve.ENGINE_FLAGS)
    assert EngineConfig(**sizes) == EngineConfig()
    # The server itself reserves slots for tenants.
    left_out = field_types(EngineConfig).keys() - set(serve.ENGINE_FLAGS)
    assert left_out == {"kept_rows", "kept_beside_others"}


def test_a_new_field_of_sampling_gets_a_flag_by_itself():
    @dataclasses.dataclass(frozen=True)
    class More(Sampling):
        """More.

        Attributes:
          typical_p: of a new filter.
        """

        typical_p: float = 1.0

    values = flags.FlagValues()
    dataclass_flags.define_flags(values, More)
    assert (values["typical_p"].value, values["typical_p"].help) == (1.0, "of a new filter")
    assert manifest._json_types(More)["typical_p"] == (int, float)
