"""Which chat template a tokenizer gets, and whether conversations can be learnt in it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from minima.assets import read_template
from minima.data.chat import PROBE, ChatTemplate, ChatTokenizer, Span, chat_tokenizer, template_of
from minima.data.tokenizer import ends_added, load_tokenizer
from minima.data.turns import ASSISTANT, SYSTEM, Turn, Unfit
from minima.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("minima.data")
MINICHAT, OWN = "minichat", "own"
_BEGIN = "{{- bos_token -}}\n"
_MEND = "set `chat_template: minichat`, or mend the template"


def set_template(tokenizer: "PreTrainedTokenizerBase", chosen: str | None) -> None:
    """Give a tokenizer its chat template, after a look at whether conversations can be learnt in it.

    Args:
        tokenizer: is changed; saved with `save_pretrained`, the template lies beside it.
        chosen: `minichat`, `own`, the path of a Jinja file, or None for the tokenizer's own where it has one.

    Raises:
        DataError: there is no such template, the template refuses a plain conversation, its text cannot be split into
            turns, leaves some of them out, learns more than the replies, or ends a reply with no token of its own.
    """
    own = tokenizer.chat_template is not None
    name = chosen or (OWN if own else MINICHAT)
    if name == MINICHAT:
        adds_begin, _ = ends_added(tokenizer)
        tokenizer.chat_template = (_BEGIN if adds_begin else "") + read_template(MINICHAT)
    elif name != OWN:
        tokenizer.chat_template = _read(Path(name).expanduser())
    elif not own:
        raise DataError(
            "the tokenizer has no chat template of its own",
            "a conversation has to become one text",
            "set `chat_template: minichat`, or give the path of a Jinja file",
        )
    _check(chat_tokenizer(tokenizer), "its own" if name == OWN else repr(name))


def other_format(data: Path, own: Path) -> str | None:
    """How a store's conversations are written down in another way than a model's tokenizer does it.

    What the two templates write is compared, not how they are spelt: one with marks around its replies is the same.

    Args:
        data: folder of the tokenizer that the store was made with.
        own: folder of the model's own.

    Returns:
        Where the two texts part; None where they do not, and where the model's tokenizer has no template.
    """
    try:
        templates = [
            None if tokenizer.chat_template is None else template_of(tokenizer)
            for tokenizer in map(load_tokenizer, (data, own))
        ]
    except DataError as error:  # a model may have a tokenizer of a kind of its own
        logger.warning("cannot tell whether %s and %s write conversations in one way: %s", data, own, error.what)
        return None
    theirs, ours = templates
    if theirs is None or ours is None:
        return None
    for turns in (PROBE, [(SYSTEM, "quartz"), *PROBE], PROBE[:1], PROBE[:3]):
        texts = [_rendered_text(template, turns) for template in (theirs, ours)]
        if texts[0] != texts[1]:
            parted = (n for n, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1])
            begin = max(0, next(parted, min(map(len, texts))) - 20)
            return " against ".join(repr(text[begin : begin + 60]) for text in texts)
    return None


def _rendered_text(template: ChatTemplate, turns: list[Turn]) -> str:
    from jinja2 import TemplateError

    try:
        return template.render(turns, prompt=turns[-1][0] != ASSISTANT)
    except TemplateError:
        return "(refused)"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the chat template {str(path)!r} cannot be read: {error}",
            "a conversation has to become one text",
            f"give `{MINICHAT}`, `{OWN}` or the path of a Jinja file (looked from {Path.cwd()})",
        ) from error


def _check(chat: ChatTokenizer, name: str) -> None:
    """Refuse a template in which plain conversations cannot be learnt."""
    from jinja2 import TemplateError

    try:
        text, replies = chat.template.replies(PROBE)
        prompts = [chat.template.render(PROBE[:turns], prompt=True) for turns in (1, 3)]
    except TemplateError as error:
        raise DataError(
            f"the chat template ({name}) refuses a conversation of two exchanges: {error}",
            "none could be learnt in it",
            _MEND,
        ) from error
    except Unfit as error:
        raise DataError(
            f"the chat template ({name}) writes earlier turns in another way once there are later ones, or marks more "
            "or fewer replies than there are",
            "so it cannot be told which of the text the assistant says",
            f"{_MEND} (put its replies between {{% generation %}} and {{% endgeneration %}})",
        ) from error
    ids = chat.encode_text(text)
    for prompt in prompts:
        asked = chat.encode_text(prompt)
        if not text.startswith(prompt) or ids[: len(asked)] != asked:
            raise DataError(
                f"the chat template ({name}) asks for an answer with {prompt[-40:]!r}, whose tokens are not those of "
                "the answered conversation",
                "the model would be asked in another way than it learns",
                _MEND,
            )
    _check_replies(chat, name, text, replies, prompts)


def _check_replies(chat: ChatTokenizer, name: str, text: str, replies: list[Span], prompts: list[str]) -> None:
    """Refuse a template whose replies are not an answer and one token that ends it."""
    missing = [said for _, said in PROBE if said not in text]
    if missing:
        raise DataError(
            f"the chat template ({name}) leaves out what is said: {', '.join(missing)} of {text!r}",
            "the model would learn to answer what it does not see",
            _MEND,
        )
    (chats,) = chat.encode([PROBE])
    assert not isinstance(chats, Unfit)
    for (begin, end), (first, last), (_, answer), prompt in zip(
        replies, chats.replies, PROBE[1::2], prompts, strict=True
    ):
        before, found, after = text[begin:end].partition(answer)
        # What a template marks behind the prompt is meant to be written: before an answer an empty thought, in Qwen3's.
        meant = chat.template.marked and begin >= len(prompt)
        if not found or (before.strip() and not meant):
            raise DataError(
                f"the chat template ({name}) takes {text[begin:end]!r} for the reply {answer!r}",
                "a model would learn to write what comes before its answer, or not learn the answer",
                f"{_MEND}: write the assistant's header for `add_generation_prompt` too, or put replies between "
                "{% generation %} and {% endgeneration %}",
            )
        if not after:
            raise DataError(
                f"the chat template ({name}) has no end marker in {text!r}, or does not mark it as the reply's",
                "a model would never learn to stop",
                _MEND,
            )
        if not chat.marker_ids.intersection(chats.ids[first:last]):
            raise DataError(
                f"the chat template ({name}) ends a reply with {after!r}, which is no special or added token",
                "generation stops at single tokens only, so the model would write it and go on",
                f"add {after.strip()!r} to the tokenizer as a special token, or end replies with `eos_token`",
            )
