"""The points of a sweep, composed: what they have in common only once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from src.config.command_line import REPLACED_WHOLE, CommandLine
from src.config.compose import COMPOSITION_ERRORS, compose, problem_of
from src.config.composed import Composed
from src.config.merging import copy_of, make_room
from src.config.quoting import escaped
from src.config.resolving import resolve_sections


@dataclass(frozen=True)
class Assignment:
    """A key's value as a file has it, which no grammar has to read."""

    key: str
    value: Any


class Points:
    """Composes the points of a sweep. What they have in common is composed once for each choice of groups."""

    def __init__(self, fixed: Sequence[str | Assignment], line: CommandLine) -> None:
        self._fixed, self._line = list(fixed), line  # overrides that all points have, forced
        self._bases: dict[tuple[str, ...], tuple[Composed, DictConfig]] = {}

    def moved(self, line: CommandLine) -> Self:
        """Compose the same of other options."""
        return type(self)(self._fixed, line)

    def compose(self, own: Sequence[str | Assignment]) -> Composed:
        """Compose a point of its own overrides, forced."""
        texts = [text for text in self._fixed if isinstance(text, str)]
        groups = tuple(text for text in own if isinstance(text, str) and not text.startswith("++"))
        if groups not in self._bases:
            base = compose([*texts, *groups], self._line, resolve=False)
            self._bases[groups] = base, OmegaConf.create(base.sections)
        base, whole = self._bases[groups]
        if base.problems:
            return compose([*texts, *(text for text in own if isinstance(text, str))], self._line)
        composed = Composed({}, base.run_dir, base.choices, hydra=base.hydra, files=base.files)
        whole = copy_of(whole)
        files = [one for one in self._fixed if isinstance(one, Assignment)]
        for one in [*files, *(texts if files else []), *own]:  # the command line's once more: it goes before files
            if isinstance(one, str) and not one.startswith("++"):
                continue
            given = _parsed(one) if isinstance(one, str) else Assignment(one.key, escaped(one.value))
            make_room(whole, given.key, given.value)
            try:
                if given.key in REPLACED_WHOLE:
                    OmegaConf.update(whole, given.key, None, force_add=True)
                OmegaConf.update(whole, given.key, given.value, merge=True, force_add=True)
            except COMPOSITION_ERRORS as error:
                composed.problems.append(problem_of(error, given.key))
        if not composed.problems:
            resolve_sections(whole, composed)
        return composed


@lru_cache(maxsize=10_000)
def _parsed(text: str) -> Assignment:
    override = OverridesParser.create().parse_override(text)
    return Assignment(override.key_or_group, override.value())
