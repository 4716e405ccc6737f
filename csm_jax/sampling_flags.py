"""How codes are drawn, as flags of the command lines."""

from collections.abc import Callable

from absl import flags

from csm_jax.sampling import Sampling


def define_flags(values: flags.FlagValues) -> None:
    def define(kind: Callable, name: str, default: object, help: str) -> None:
        kind(name, default, help, flag_values=values)

    whole, real = flags.DEFINE_integer, flags.DEFINE_float
    define(real, "temperature", 0.9, "over 0; lower is safer")
    define(whole, "top_k", 50, "sample among the k likeliest")
    define(real, "top_p", 1.0, "sample among the likeliest that make up p; 1 is off")
    define(real, "min_p", 0.0, "drop what is less likely than this share of the likeliest")
    define(real, "repetition_penalty", 1.0, "for codebook 0; 1 is off")
    define(flags.DEFINE_boolean, "greedy", False, "always the likeliest")
    define(real, "depth_temperature", None, "for codebooks 1 and up; default: --temperature")
    define(whole, "depth_top_k", None, "for codebooks 1 and up; default: --top_k")


def read_flags(values: flags.FlagValues) -> Sampling:
    """Raises `InputError` for numbers out of range."""
    return Sampling(
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        min_p=values.min_p,
        repetition_penalty=values.repetition_penalty,
        greedy=values.greedy,
        depth_temperature=values.depth_temperature,
        depth_top_k=values.depth_top_k,
    )
