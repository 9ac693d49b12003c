"""Secrets in code: what the recognisers find in any text, and quoted values that are given to a secret's name.

    SECRET_KEY = "django-insecure-8#k2l…"      {"client_secret": "Zm9vYmFy…"}      os.environ.get("API_KEY", "9f8e7d…")

A name ends like that of a secret (`TOKEN`, not `TOKEN_URL` or `tokenizer`); its value has eight characters or more, no white
space, and a digit or sign, which a password assigned by `=` need not have. What only shows where a secret goes (`"<your key>"`,
`"${API_KEY}"`, `"changeme"`, a path, a link, the name of a variable) is none, nor is an expression (`token = get_token(1)`).
"""

from __future__ import annotations

import re

from finetune_assets.corpus.personal_data import find

_PASSWORD = r"(?:passw(?:or)?d|passwd|pwd|contrase[nñ]a|senha)"
_NAME = (
    r"(?:secret(?:[_-]?key)?|token|passphrase|credentials?|"
    rf"(?:api|access|private|auth|encryption|signing|account|master|service|client|jwt|hmac|session)[_-]?key|{_PASSWORD})"
)
_ASSIGNED = re.compile(
    rf"""
    (
        {_NAME}["'`]?[ \t]{{0,8}}(?::[ \t]{{0,8}}[\w.\[\]|\ ]{{1,40}})?(?:={{1,3}}>?|:=?)  # NAME: str =, "name":, name ==
        | (?:env|get|config)\(\s{{0,8}}["']\w{{0,60}}{_NAME}["'],(?:\s{{0,8}}default[ ]?=)?  # getenv("NAME",
    )
    \s{{0,8}}[rbuf]{{0,2}}(["'`])((?:(?!\2)\S){{8,200}})\2
    """,
    re.IGNORECASE | re.VERBOSE,
)
_SIGN = re.compile(r"[\d!#$%&*+=^~|\\@?]")
_STANDS_FOR_ONE = re.compile(
    r"(?i:your|change[_-]?me|example|dummy|fake|placeholder|replace|insert|x{4}|\*{3}|\.{3})|"
    r"^<.*>?$|^\[.*\]?$|^\$[{(]|\{.*\}|%\(\w+\)s|"
    r"^\w+://|^[~.]{0,2}(?:/[a-z0-9_.-]+)+$|^[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+$"
)
_EXPRESSION = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*[(\[]|[A-Za-z_.]+$")
_LONGEST = 200  # a longer value, a private key, may hold such a word by chance


def first_secret(text: str, python: bool) -> tuple[str, int] | None:
    """Kind (`secret`, or `url`: a link that carries one) and line of the first secret. In `python` a text has quotes."""
    found: list[tuple[int, str]] = []
    for one in find(text):
        before = text[max(one.start - 8, 0) : one.start].rstrip()
        expression = python and before.endswith("=") and _EXPRESSION.match(one.value)
        if one.kind == "url" or (one.kind == "secret" and _real(one.value) and not expression):
            found.append((one.start, one.kind))
    for one in _ASSIGNED.finditer(text):
        password = "=" in one[1] and re.search(_PASSWORD, one[1], re.IGNORECASE)
        if (password or _SIGN.search(one[3])) and _real(one[3]):
            found.append((one.start(3), "secret"))
    if not found:
        return None
    start, kind = min(found)
    return kind, text.count("\n", 0, start) + 1


def _real(value: str) -> bool:
    """Whether a value is more than a sign of where a secret goes."""
    return len(value) > _LONGEST or not _STANDS_FOR_ONE.search(value)
