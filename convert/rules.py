"""Conversion by tables of rules, which are checked in full before a tensor is read.

A table is a list of rules. A rule pairs names of a checkpoint with parameter paths and a transform
of the tensors; both are templates with `{placeholders}` for numbers, so that the same table reads a
layout and writes it. Every tensor must match exactly one rule or the table's explicit ignore list,
every parameter must be filled, every shape must fit, and one error lists all problems.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from csm_jax.errors import CheckpointError

Shape = jax.ShapeDtypeStruct
Numbers = tuple[tuple[str, str], ...]

# More problems than this are the same problem.
MAX_PROBLEMS = 8


@dataclass(frozen=True)
class Transform:
    """How the tensors of a rule become its parameters, and back.

    `forward` takes one array per source and returns one per target; `inverse` the reverse. Both
    are written with array methods alone, because shapes are checked by tracing them.
    """

    forward: Callable[..., Sequence[Any]]
    inverse: Callable[..., Sequence[Any]]


def one_to_one(forward: Callable[[Any], Any], inverse: Callable[[Any], Any]) -> Transform:
    """A transform of one tensor to one parameter."""
    return Transform(lambda x: (forward(x),), lambda x: (inverse(x),))


IDENTITY = one_to_one(lambda x: x, lambda x: x)


@dataclass(frozen=True)
class Rule:
    """Templates of the tensors that together make up the parameters.

    With `alternatives`, the sources are several names for the same tensor: at least one must be
    there, and where there are more they must hold the same values.
    """

    sources: str | tuple[str, ...]
    targets: str | tuple[str, ...]
    transform: Transform = IDENTITY
    alternatives: bool = False

    @property
    def source_templates(self) -> tuple[str, ...]:
        return (self.sources,) if isinstance(self.sources, str) else self.sources

    @property
    def target_templates(self) -> tuple[str, ...]:
        return (self.targets,) if isinstance(self.targets, str) else self.targets


@dataclass(frozen=True)
class Table:
    """The rules of one layout; `ignore` has templates of tensors that are not parameters."""

    name: str
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()

    def prefixed(self, source: str, target: str) -> "Table":
        """The same table for tensors and parameters under a prefix."""
        rules = tuple(
            Rule(
                tuple(source + t for t in rule.source_templates),
                tuple(target + t for t in rule.target_templates),
                rule.transform,
                rule.alternatives,
            )
            for rule in self.rules
        )
        return Table(self.name, rules, tuple(source + t for t in self.ignore))


class TensorSource(Protocol):
    """A source of tensors: their shapes at once, their values one at a time."""

    @property
    def name(self) -> str: ...
    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    def read(self, key: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Assignment:
    """One application of a rule: the tensors, and the parameters that they make."""

    rule: Rule
    keys: tuple[str, ...]
    paths: tuple[str, ...]


def convert(
    table: Table, source: TensorSource, targets: Mapping[str, Shape]
) -> Iterator[tuple[str, np.ndarray]]:
    """Checks everything, then yields (parameter path, array) one at a time, in the source's types.

    Args:
      targets: shape of every parameter by its '/'-separated path.

    Raises:
      CheckpointError: some tensors or parameters do not fit; it lists them, before any is read.
    """
    assignments = plan(table, source, targets)
    return (
        pair
        for assignment in assignments
        for pair in zip(assignment.paths, _read(assignment, source), strict=True)
    )


def plan(table: Table, source: TensorSource, targets: Mapping[str, Shape]) -> list[Assignment]:
    """Matches every tensor with its rule and checks the whole, without reading any.

    Assignments are in the order of their paths, so that those of a layer are adjacent.

    Raises `CheckpointError` as `convert` does.
    """
    grouped, problems = _match_keys(table, source.shapes)
    assignments = []
    for (rule, numbers), found in grouped.items():
        keys = tuple(_fill(t, numbers) for t in rule.source_templates)
        absent = [key for key in keys if key not in found]
        if absent and not rule.alternatives:
            problems += [f"missing tensor {key}" for key in absent]
            continue
        keys = tuple(key for key in keys if key in found)
        paths = tuple(_fill(t, numbers) for t in rule.target_templates)
        assignments.append(Assignment(rule, keys, paths))
    problems += _check_shapes(assignments, source.shapes, targets)
    problems += _check_filled(table, grouped, targets)
    if problems:
        raise CheckpointError(_summary(table, source.name, problems))
    return sorted(assignments, key=lambda assignment: assignment.paths)


def invert(
    table: Table, params: Mapping[str, Any], read: Callable[[str], Any]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The reverse of `convert`: yields every tensor name of the layout with a function to make it.

    Where a layout has alternative names for one tensor, the first is written.
    """
    for rule, numbers in _rules_of_paths(table, params):
        paths = [_fill(t, numbers) for t in rule.target_templates]
        names = [_fill(t, numbers) for t in rule.source_templates]

        def make(index: int, rule: Rule = rule, paths: list[str] = paths) -> np.ndarray:
            return rule.transform.inverse(*(read(path) for path in paths))[index]

        for index, name in enumerate(names[:1] if rule.alternatives else names):
            yield name, lambda index=index, make=make: make(index)


def _match_keys(
    table: Table, shapes: Mapping[str, Shape]
) -> tuple[dict[tuple[Rule, Numbers], set[str]], list[str]]:
    """The keys of every application of a rule, and the problems of all other keys."""
    patterns = [(_pattern(t), rule) for rule in table.rules for t in rule.source_templates]
    ignored = [_pattern(t) for t in table.ignore]
    grouped: dict[tuple[Rule, Numbers], set[str]] = {}
    problems = []
    for key in shapes:
        if any(pattern.fullmatch(key) for pattern in ignored):
            continue
        matches = [(m, rule) for pattern, rule in patterns if (m := pattern.fullmatch(key))]
        if len(matches) != 1:
            reason = "unexpected tensor" if not matches else "ambiguous tensor"
            problems.append(f"{reason} {key}")
            continue
        match, rule = matches[0]
        numbers = tuple(sorted(match.groupdict().items()))
        grouped.setdefault((rule, numbers), set()).add(key)
    return grouped, problems


def _check_shapes(
    assignments: list[Assignment], shapes: Mapping[str, Shape], targets: Mapping[str, Shape]
) -> list[str]:
    problems = []
    for assignment in assignments:
        rule, sources = assignment.rule, [shapes[key] for key in assignment.keys]
        wanted = [targets[path] for path in assignment.paths if path in targets]
        if len(wanted) < len(assignment.paths):
            problems += [f"unexpected tensor {key}" for key in assignment.keys]
            continue
        try:
            made = [jax.eval_shape(rule.transform.forward, *g) for g in _groups(rule, sources)]
            fits = all([m.shape for m in one] == [w.shape for w in wanted] for one in made)
        except (TypeError, ValueError, IndexError, ZeroDivisionError):
            fits = False
        if not fits:
            problems.append(_shape_problem(assignment, sources, wanted))
    return problems


def _shape_problem(
    assignment: Assignment, sources: Sequence[Shape], wanted: Sequence[Shape]
) -> str:
    wanted = jax.eval_shape(assignment.rule.transform.inverse, *wanted)
    pairs = zip(assignment.keys, sources, list(wanted) * len(sources), strict=False)
    wrong = [
        f"{key} is {list(s.shape)} but the config wants {list(w.shape)}"
        for key, s, w in pairs
        if s.shape != w.shape
    ]
    return "; ".join(wrong) or f"{', '.join(assignment.keys)}: shape does not fit the config"


def _check_filled(
    table: Table, grouped: Mapping[tuple[Rule, Numbers], set[str]], targets: Mapping[str, Shape]
) -> list[str]:
    return [
        f"missing tensor {_fill(rule.source_templates[0], numbers)}"
        for rule, numbers in _rules_of_paths(table, targets)
        if (rule, numbers) not in grouped
    ]


def _rules_of_paths(table: Table, paths: Iterable[str]) -> Iterator[tuple[Rule, Numbers]]:
    """Each application of a rule that makes some of these parameters, once."""
    patterns = [(_pattern(t), rule) for rule in table.rules for t in rule.target_templates]
    seen = set()
    for path in paths:
        matches = [(m, rule) for pattern, rule in patterns if (m := pattern.fullmatch(path))]
        if len(matches) != 1:
            raise CheckpointError(f"{table.name}: {len(matches)} rules make parameter {path}")
        match, rule = matches[0]
        application = rule, tuple(sorted(match.groupdict().items()))
        if application not in seen:
            seen.add(application)
            yield application


def _read(assignment: Assignment, source: TensorSource) -> Sequence[np.ndarray]:
    tensors = [source.read(key) for key in assignment.keys]
    if assignment.rule.alternatives:
        for key, tensor in zip(assignment.keys[1:], tensors[1:], strict=True):
            if not np.array_equal(tensor, tensors[0]):
                raise CheckpointError(
                    f"{source.name}: {key} and {assignment.keys[0]} should be one tied tensor, "
                    "but their values differ"
                )
    return assignment.rule.transform.forward(*_groups(assignment.rule, tensors)[0])


def _groups(rule: Rule, tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """The inputs of the transform: all tensors together, or each of the alternatives."""
    return [[tensor] for tensor in tensors] if rule.alternatives else [tensors]


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", escaped))


def _fill(template: str, numbers: Numbers) -> str:
    return template.format_map(dict(numbers))


def _summary(table: Table, name: str, problems: list[str]) -> str:
    shown = "; ".join(problems[:MAX_PROBLEMS])
    rest = len(problems) - MAX_PROBLEMS
    more = f"; and {rest} more" if rest > 0 else ""
    return f"{name} does not fit the {table.name} layout: {shown}{more}"
