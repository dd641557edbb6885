"""The choice of a tokenizer's chat template, and the check that a model can be trained on conversations in it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from minima.assets import read_template
from minima.data.chats.templates import PROBE, ChatTemplate, ChatTokenizer, Span, chat_tokenizer, template_of
from minima.data.chats.turns import ASSISTANT, SYSTEM, Turn, Unfit
from minima.data.tokenizer import ends_added, load_tokenizer
from minima.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("minima.data")
MINICHAT, OWN = "minichat", "own"
_BEGIN = "{{- bos_token -}}\n"
_MEND = "set `chat_template: minichat`, or fix the template"


def set_template(tokenizer: "PreTrainedTokenizerBase", chosen: str | None) -> None:
    """Set a tokenizer's chat template, and check that a model can be trained on conversations in it.

    Args:
        tokenizer: is modified; `save_pretrained` writes the template beside it.
        chosen: `minichat`, `own`, the path of a Jinja file, or None for the tokenizer's own if it has one, else
            `minichat`.

    Raises:
        DataError: there is no such template; the template refuses a plain conversation; its text cannot be split into
            turns, omits some of them or marks more than the replies; or it does not end a reply with a special token.
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
            "a template is needed to turn a conversation into text",
            "set `chat_template: minichat`, or give the path of a Jinja file",
        )
    _check(chat_tokenizer(tokenizer), "its own" if name == OWN else repr(name))


def other_format(data: Path, own: Path) -> str | None:
    """How a store's conversation format differs from that of a model's own tokenizer.

    The rendered texts are compared, not the templates: marks around replies, for example, make no difference.

    Args:
        data: folder of the tokenizer that the store was made with.
        own: folder of the model's own tokenizer.

    Returns:
        The two texts where they start to differ; None if they are equal, or if one of the tokenizers has no template.
    """
    try:
        tokenizers = [load_tokenizer(folder) for folder in (data, own)]
        if any(tokenizer.chat_template is None for tokenizer in tokenizers):
            return None
        templates = [template_of(tokenizer) for tokenizer in tokenizers]
    except DataError as error:  # a model may have a tokenizer of an unsupported kind
        logger.warning("cannot tell whether %s and %s format conversations alike: %s", data, own, error.what)
        return None
    for turns in (PROBE, [(SYSTEM, "quartz"), *PROBE], PROBE[:1], PROBE[:3]):
        texts = [_rendered_text(template, turns) for template in templates]
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
            "a template is needed to turn a conversation into text",
            f"give `{MINICHAT}`, `{OWN}` or the path of a Jinja file (relative to {Path.cwd()})",
        ) from error


def _check(chat: ChatTokenizer, name: str) -> None:
    """Refuse a template that does not work for training on plain conversations."""
    from jinja2 import TemplateError

    try:
        text, replies = chat.template.replies(PROBE)
        prompts = [chat.template.render(PROBE[:turns], prompt=True) for turns in (1, 3)]
    except TemplateError as error:
        raise DataError(
            f"the chat template ({name}) refuses a conversation of two exchanges: {error}",
            "so no conversation could be trained on with it",
            _MEND,
        ) from error
    except Unfit as error:
        raise DataError(
            f"the chat template ({name}) writes earlier turns differently once there are later ones, or marks more or "
            "fewer replies than there are",
            "so it is not known which part of the text is the assistant's",
            f"{_MEND} (put its replies between {{% generation %}} and {{% endgeneration %}})",
        ) from error
    ids = chat.encode_text(text)
    for prompt in prompts:
        asked = chat.encode_text(prompt)
        if not text.startswith(prompt) or ids[: len(asked)] != asked:
            raise DataError(
                f"the chat template ({name}) asks for an answer with {prompt[-40:]!r}, whose tokens differ from those "
                "of the answered conversation",
                "the model would be prompted in a way other than the one it was trained on",
                _MEND,
            )
    _check_replies(chat, name, text, replies, prompts)


def _check_replies(chat: ChatTokenizer, name: str, text: str, replies: list[Span], prompts: list[str]) -> None:
    """Refuse a template whose replies are anything but an answer followed by a token that ends it."""
    missing = [said for _, said in PROBE if said not in text]
    if missing:
        raise DataError(
            f"the chat template ({name}) omits messages: {', '.join(missing)} missing from {text!r}",
            "the model would be trained to answer messages that it does not see",
            _MEND,
        )
    (chats,) = chat.encode([PROBE])
    assert not isinstance(chats, Unfit)
    for (begin, end), (first, last), (_, answer), prompt in zip(
        replies, chats.replies, PROBE[1::2], prompts, strict=True
    ):
        before, found, after = text[begin:end].partition(answer)
        # Text that a template marks after the prompt is meant to be generated: Qwen3's has an empty thought there.
        meant = chat.template.marked and begin >= len(prompt)
        if not found or (before.strip() and not meant):
            raise DataError(
                f"the chat template ({name}) takes {text[begin:end]!r} for the reply {answer!r}",
                "a model would be trained to write what comes before its answer, or not be trained on the answer",
                f"{_MEND}: write the assistant's header for `add_generation_prompt` too, or put replies between "
                "{% generation %} and {% endgeneration %}",
            )
        if not after:
            raise DataError(
                f"the chat template ({name}) has no end marker in {text!r}, or does not mark it as part of the reply",
                "a model would never learn to stop",
                _MEND,
            )
        if not chat.marker_ids.intersection(chats.ids[first:last]):
            raise DataError(
                f"the chat template ({name}) ends a reply with {after!r}, which is not a special or added token",
                "generation stops at single tokens only, so the model would write this marker and continue",
                f"add {after.strip()!r} to the tokenizer as a special token, or end replies with `eos_token`",
            )
