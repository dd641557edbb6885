"""What looks like a token, and may not stand in a cluster file or an override: others can read job scripts."""

import re
from collections.abc import Sequence

from minima.errors import ClusterError
from minima.recipe.secret import passwords_in, token_in

# A word that ends here: MAX_TOKENS and TOKENIZER are of text, PGPASSWORD and accessToken are not.
_NAME = re.compile(
    r"(?i:TOKEN|SECRETS?|PASSWORDS?|PASSWD|CREDENTIALS?|(?:API|ACCESS|PRIVATE)_?KEYS?)(?![a-z])(?:(?<=[a-z])|(?![A-Z]))"
)
_OF_TEXT = re.compile(  # of a tokenizer, or a number of tokens: eos_token, pad_token_id, SECONDS_PER_TOKEN
    r"(?<![A-Z])(?:BOS|EOS|PAD|UNK|SEP|CLS|MASK|PER)_TOKEN(?![A-Z])|(?<![A-Z])TOKEN_(?:LIMIT|COUNT|BUDGET)(?![A-Z])",
    re.IGNORECASE,
)
_NO_SECRET = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS")  # a switch and a path
_PLACES = ("_PATH", "_FILE", "_DIR", "_STDIN")  # HF_TOKEN_PATH says where a token lies, and --password-stdin
_AFTER_OPTION = re.compile(r"(?<!\S)--([a-z-]+)\s+('[^']*'|\"[^\"]*\"|[^\s'\"<-][^\s'\"]*)")  # --token VALUE
_ASSIGNED = re.compile(r"(?<![A-Za-z0-9_])([A-Za-z_][A-Za-z0-9_-]*)=(?=('[^']*'|\"[^\"]*\"|[^\s,;'\"]*))")
_SWITCHES = ("true", "false", "0", "1")
_READ = re.compile(r"[$`]")  # from a variable or a command, such as $(cat ~/.token)
_WHY = "it would stand in job scripts or on a command line, which others may read"
_INHERIT = "in your shell before `minima submit`: jobs inherit its environment"


def names_secret(name: str) -> bool:
    """Whether a variable or an option of this name holds a token or a password."""
    plain = name.replace("-", "_")
    if plain in _NO_SECRET or plain.upper().endswith(_PLACES):
        return False
    return bool(_NAME.search(_OF_TEXT.sub("", plain)))


def refuse_secret(key: str, name: str) -> ClusterError:
    """The refusal of a variable; it does not repeat the value."""
    variable = name.upper().replace("-", "_") if "-" in name else name
    return ClusterError(f"{key}: {name} looks like a secret", _WHY, f"export {variable} {_INHERIT}")


def check_lines(key: str, lines: Sequence[str], shell: bool) -> None:
    """Refuse lines or options that hold a token.

    Args:
        key: of the cluster file.
        lines: of it.
        shell: a shell reads them, so a line may take a token from a file or another variable.

    Raises:
        ClusterError: a variable or an option that is named like a secret is given a value, or a token stands there.
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
    """Refuse texts in which a token stands, or an address with a password, whatever it is called.

    Args:
        key: what an error calls them.
        texts: to look at.
        shell: a shell reads them, so a password may come from a file or a variable.

    Raises:
        ClusterError: names the key, and does not repeat the text.
    """
    for text in texts:
        passwords = [word for word in passwords_in(text) if not (shell and _READ.search(word))]
        if found := token_in(text):
            what = "HF_TOKEN" if found.startswith("hf_") else "it in a variable"
            raise ClusterError(f"{key}: what looks like a token stands there", _WHY, f"export {what} {_INHERIT}")
        if passwords:
            raise ClusterError(
                f"{key}: an address with a password stands there", _WHY, f"export it in a variable {_INHERIT}"
            )
