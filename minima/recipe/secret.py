"""Find tokens, and addresses with passwords, in recipes and job scripts, which others can read. No torch."""

import re
from collections.abc import Iterator
from typing import Any

_TOKEN = re.compile(  # the Hub's (hf_transfer and hf_xet are packages), GitHub's, GitLab's, OpenAI's, Amazon's
    r"\b(hf_[A-Za-z0-9]{20,}|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|AKIA[A-Z0-9]{16})|(?<![\w-])sk-((?:proj|svcacct|admin|ant)-[\w-]{20,}|[A-Za-z0-9]{32,})"  # sk- is Slovak, too
)
_OF_A_URL = re.compile(r"(?:https?|ftps?|socks5h?)://[^/@\s'\"]*:([^/@\s'\"]+)@")  # https://user:password@proxy


def token_in(text: str) -> str | None:
    """The first part of a text that looks like a token; None if nothing does."""
    found = _TOKEN.search(text)
    return None if found is None else found[0]


def passwords_in(text: str) -> list[str]:
    """The passwords in a text's addresses."""
    return _OF_A_URL.findall(text)


def secret_place(value: Any, place: str = "") -> str | None:
    """The place of a token or a password among keys and values, as `stages.1.sources`; None if there is none."""
    for where, text in _texts(value, place):
        if _is_sure(token_in(text) or "") or passwords_in(text):
            return where
    return None


def _is_sure(token: str) -> bool:
    """Whether it can hardly be an ordinary name: tokens are long, and mix capitals and digits."""
    return len(token) >= 20 and any(map(str.isdigit, token)) and any(map(str.isupper, token))


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _texts(inner, f"{place}.{key}" if place else str(key))
