"""Refuses secrets in cluster files and overrides, because other users can read job scripts."""

import re
from collections.abc import Sequence

from minima.errors import ClusterError
from minima.recipe.secret import passwords_in, token_in

# Only at the end of a word: PGPASSWORD and accessToken name secrets, MAX_TOKENS and TOKENIZER do not.
_NAME = re.compile(
    r"(?i:TOKEN|SECRETS?|PASSWORDS?|PASSWD|CREDENTIALS?|(?:API|ACCESS|PRIVATE)_?KEYS?)(?![a-z])(?:(?<=[a-z])|(?![A-Z]))"
)
_OF_TEXT = re.compile(  # text tokens, not secrets: eos_token, pad_token_id, SECONDS_PER_TOKEN
    r"(?<![A-Z])(?:BOS|EOS|PAD|UNK|SEP|CLS|MASK|PER)_TOKEN(?![A-Z])|(?<![A-Z])TOKEN_(?:LIMIT|COUNT|BUDGET)(?![A-Z])",
    re.IGNORECASE,
)
_NO_SECRET = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS")  # a switch and a path
_PLACES = ("_PATH", "_FILE", "_DIR", "_STDIN")  # where a secret is, not the secret: HF_TOKEN_PATH, --password-stdin
_AFTER_OPTION = re.compile(r"(?<!\S)--([a-z-]+)\s+('[^']*'|\"[^\"]*\"|[^\s'\"<-][^\s'\"]*)")  # --token VALUE
_ASSIGNED = re.compile(r"(?<![A-Za-z0-9_])([A-Za-z_][A-Za-z0-9_-]*)=(?=('[^']*'|\"[^\"]*\"|[^\s,;'\"]*))")
_SWITCHES = ("true", "false", "0", "1")
_READ = re.compile(r"[$`]")  # read from a variable or a command, such as $(cat ~/.token)
_WHY = "it would appear in job scripts or on a command line, which other users may read"
_INHERIT = "in your shell before `minima submit`: jobs inherit its environment"


def names_secret(name: str) -> bool:
    """Whether a variable or an option of this name contains a token or a password."""
    plain = name.replace("-", "_")
    if plain in _NO_SECRET or plain.upper().endswith(_PLACES):
        return False
    return bool(_NAME.search(_OF_TEXT.sub("", plain)))


def refuse_secret(key: str, name: str) -> ClusterError:
    """The error for a variable that looks like a secret; it does not repeat the value."""
    variable = name.upper().replace("-", "_") if "-" in name else name
    return ClusterError(f"{key}: {name} looks like a secret", _WHY, f"export {variable} {_INHERIT}")


def check_lines(key: str, lines: Sequence[str], shell: bool) -> None:
    """Refuse lines or options that contain a token.

    Args:
        key: the cluster file's key.
        shell: whether a shell runs the lines, so that they may read a token from a file or another variable.

    Raises:
        ClusterError: a variable or an option named like a secret is given a value, or a line contains a token.
    """
    for line in lines:
        for name, value in [*_ASSIGNED.findall(line), *_AFTER_OPTION.findall(line)]:
            text = value.strip("'\"")
            is_read = shell and not value.startswith("'") and _READ.search(text)
            if text and names_secret(name) and not is_read and text.lower() not in _SWITCHES:
                error = refuse_secret(key, name)
                more = f"; or read it there from a file of yours: {name}=$(cat ~/.token)" if shell else ""
                raise ClusterError(error.what, error.why, error.do + more)
    check_values(key, lines, shell)


def check_values(key: str, texts: Sequence[str], shell: bool = False) -> None:
    """Refuse texts that contain a token, or an address with a password, under whatever name.

    Args:
        key: their name in an error.
        shell: whether a shell runs them, so that a password may come from a file or a variable.

    Raises:
        ClusterError: names the key, and does not repeat the text.
    """
    for text in texts:
        passwords = [word for word in passwords_in(text) if not (shell and _READ.search(word))]
        if found := token_in(text):
            what = "HF_TOKEN" if found.startswith("hf_") else "it in a variable"
            raise ClusterError(f"{key}: it contains what looks like a token", _WHY, f"export {what} {_INHERIT}")
        if passwords:
            raise ClusterError(
                f"{key}: it contains an address with a password", _WHY, f"export it in a variable {_INHERIT}"
            )
