"""Whether a reply to one tenant's user holds what is another tenant's: a name, an address number, a code.

What is a tenant's own is learnt from the training examples: names and numbers (see `facts`) that occur in its replies and in no
text of any other tenant. A model that was trained on many tenants mixes them up easily, and its users notice at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from finetune_assets.evaluation.facts import Fact, facts, support

KINDS = ("name", "code")
Own = Mapping[Fact, str]
"""Fact -> the only tenant that has it."""


def own_facts(examples: Iterable[tuple[str, Sequence[str], str]]) -> dict[Fact, str]:
    """`examples`: (tenant, texts of the prompt, reply). Empty where there is a single tenant."""
    holders: dict[Fact, set[str]] = {}
    said: set[Fact] = set()
    for tenant, prompt, reply in examples:
        for fact in _private(reply):
            holders.setdefault(fact, set()).add(tenant)
            said.add(fact)
        for text in prompt:
            for fact in _private(text):
                holders.setdefault(fact, set()).add(tenant)
    tenants = {tenant for held in holders.values() for tenant in held}
    if len(tenants) < 2:
        return {}
    return {fact: next(iter(held)) for fact, held in holders.items() if len(held) == 1 and fact in said}


def foreign(reply: str, tenant: str, said: Sequence[str], own: Own) -> list[Fact]:
    """Facts of the reply that are another tenant's, and that nobody said in this conversation."""
    found = [fact for fact in _private(reply) if own.get(fact, tenant) != tenant]
    context = support(said) if found else None
    return sorted(fact for fact in found if context is not None and not context.has(fact))


def _private(text: str) -> list[Fact]:
    return [fact for fact in facts(text) if fact[0] in KINDS]
