"""One dialogue while it is being made: who speaks, in which register, and what personal data was planted."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace

from .grammar import Slots, expand, shield, tidy, unshield
from .noise import roughen
from .phrases import COMMON


@dataclass(frozen=True)
class Turn:
    """One message. `pii` holds (kind, value) pairs that stand in its text."""

    role: str
    text: str
    intent: str | None = None
    pii: tuple[tuple[str, str], ...] = ()

    def saying(self, text: str) -> Turn:
        """The same turn with another text."""
        return replace(self, text=text)


@dataclass
class Talk:
    """Collects turns. `voseo` is the place's region, `level` how carelessly the person writes."""

    rng: random.Random
    voseo: bool
    level: int
    slots: Slots
    turns: list[Turn] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    greeted: bool = False
    split: float = 0.12

    def say(self, templates: list[str], **slots: str) -> str:
        """Expand one of the templates with the shared phrases, the talk's slots and these."""
        merged: Slots = {**COMMON, **self.slots, **slots}
        return expand(self.rng, self.rng.choice(templates), merged, self.voseo)

    def user(self, intent: str, templates: list[str], pii: tuple[tuple[str, str], ...] = (), **slots: str) -> None:
        """The person writes, with a greeting the first time, sometimes in several messages."""
        text = self.say(templates, **slots)
        if not self.greeted:
            self.greeted = True
            if self.rng.random() < 0.75:
                text = self.say(["<u_hi> ", "<u_hi>, ", "<u_hi>. "]) + text
        parts = [text]
        if self.rng.random() < self.split and not pii:
            parts = _break(self.rng, text)
        for part in parts:
            rough = roughen(self.rng, tidy(part), self.level)
            self.turns.append(Turn("user", unshield(rough), intent, pii))

    def bot(self, templates: list[str], **slots: str) -> None:
        """The assistant answers, in clean Spanish."""
        self.turns.append(Turn("assistant", unshield(tidy(self.say(templates, **slots)))))

    def introduce(self, name: str) -> str:
        """Remember a name the person gives, and shield it from noise."""
        self.names.append(name)
        return shield(name)

    def chance(self, share: float) -> bool:
        """True in that share of cases."""
        return self.rng.random() < share


def _break(rng: random.Random, text: str) -> list[str]:
    """Cut at a sentence end (or a comma) into two messages, where both have some length."""
    cuts = [found.end() for found in re.finditer(r"[.?!,] ", text) if 4 <= found.end() <= len(text) - 6]
    if not cuts:
        return [text]
    cut = rng.choice(cuts)
    return [text[:cut].rstrip(" ,"), text[cut:]]
