"""Chat templates: rendering a conversation, locating the assistant's replies in it, and the ids that end them."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minima.data.chats.turns import ASSISTANT, USER, Turn, Unfit
from minima.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_MINICHAT_MARKS = ("[|User|]", "[|Assistant|]")
# Words that no template contains itself, so that they can be located in the rendered text.
PROBE: list[Turn] = [(USER, "zebra"), (ASSISTANT, "walnut"), (USER, "tundra"), (ASSISTANT, "violin")]
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


class TokenizedChat(NamedTuple):
    """One conversation."""

    ids: list[int]  # its tokens, the same as from the tokenizer's own `apply_chat_template`
    replies: list[Span]  # for each assistant turn, its first token and one past its last, the end marker included
    text: str


class ChatTemplate(NamedTuple):
    """A Jinja chat template and the special tokens it can refer to; can be sent to worker processes."""

    text: str
    special_tokens: dict[str, str]  # `eos_token` and the like, by name

    @property
    def marked(self) -> bool:
        """Whether the template marks the assistant's replies itself, with `{% generation %}`."""
        return _MARKED.search(self.text) is not None

    def render(self, turns: list[Turn], *, prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            prompt: end with the header of an assistant's answer.

        Raises:
            jinja2.TemplateError: the template cannot be read, or refuses the conversation.
        """
        return self._render(turns, prompt=prompt)[0]

    def replies(self, turns: list[Turn]) -> tuple[str, list[Span]]:
        """The text of a conversation, and the character spans of the assistant's turns with their end markers.

        These are the spans that the template marks with `{% generation %}`. If it has no such marks, a reply begins
        where the text of the turns before it ends, and includes what the template writes after it, without trailing
        white space.

        Raises:
            jinja2.TemplateError: the template cannot be read, or refuses the conversation.
            Unfit: the text of the first turns is not a prefix of the whole text, or the marked spans do not match the
                replies one to one.
        """
        if self.marked:
            text, found = self._render(turns, spans=True)
            spans = _joined(found)
            if len(spans) != sum(role == ASSISTANT for role, _ in turns):
                raise Unfit("not_splittable")
            return text, spans
        text, spans = self.render(turns), []
        for number, (role, _) in enumerate(turns):
            if role != ASSISTANT:
                continue
            before, after = self.render(turns[:number], prompt=True), self.render(turns[: number + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise Unfit("not_splittable")
            spans.append((len(before), len(after.rstrip())))
        return text, spans

    def _render(self, turns: list[Turn], *, prompt: bool = False, spans: bool = False) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": role, "content": text} for role, text in turns]
        settings: dict[str, Any] = {"add_generation_prompt": prompt, "return_assistant_tokens_mask": spans}
        try:
            rendered: Any = render_jinja_template(
                [messages], chat_template=self.text, **(self.special_tokens | settings)
            )
        except TemplateError:
            raise
        except Exception as error:  # a template is a program: it can divide by zero, or recurse for ever
            raise TemplateError(str(error) or type(error).__name__) from error
        texts, found = rendered
        return texts[0], found[0] if spans else []


class ChatTokenizer:
    """Turns conversations into ids with a fast tokenizer, without the time that importing transformers takes.

    Args:
        tokenizer: the fast tokenizer; names of special tokens in the template's text are encoded as these tokens.

    Attributes:
        marker_ids: ids of the special and added tokens that can end a turn, except added tokens of white space.
    """

    def __init__(self, tokenizer: "Tokenizer", template: ChatTemplate) -> None:
        tokenizer.encode_special_tokens = False
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self.template = tokenizer, template
        added = tokenizer.get_added_tokens_decoder()
        self.marker_ids = {number for number, token in added.items() if token.special or token.content.strip()}
        special = [token.content for token in added.values() if token.special]
        marks = [mark for mark in _MINICHAT_MARKS if mark in template.text]
        marks += [added[number].content for number in self.end_ids()]  # may be an added token that is not special
        self._forged = re.compile("|".join(re.escape(mark) for mark in sorted({*special, *marks})) or r"(?!)")

    def forged(self, turns: list[Turn]) -> str | None:
        """The first name of a special token or marker in a text, with which it could open or end a turn, if any."""
        found = (self._forged.search(text) for _, text in turns)
        return next((match[0] for match in found if match is not None), None)

    def encode(self, conversations: list[list[Turn]]) -> list[TokenizedChat | Unfit]:
        """Tokenize conversations; for one that the template cannot render, the result is the reason."""
        from jinja2 import TemplateError

        rendered: list[tuple[str, list[Span]] | Unfit] = []
        for turns in conversations:
            try:
                rendered.append(self.template.replies(turns))
            except TemplateError:
                rendered.append(Unfit("refused_by_template"))
            except Unfit as unfit:
                rendered.append(unfit)
        fit = [item for item in rendered if not isinstance(item, Unfit)]
        encodings = iter(self._tokenizer.encode_batch([text for text, _ in fit], add_special_tokens=False))
        found: list[TokenizedChat | Unfit] = []
        for item in rendered:
            if isinstance(item, Unfit):
                found.append(item)
                continue
            encoding = next(encodings)
            found.append(TokenizedChat(encoding.ids, _tokens_of(item[1], encoding.offsets), item[0]))
        return found

    def end_ids(self) -> list[int]:
        """The first special or added token that the template writes after a reply, in a list; empty if none."""
        from jinja2 import TemplateError

        try:
            text = self.template.render(PROBE)
        except TemplateError:
            return []
        after = text.partition(PROBE[1][1])[2].partition(PROBE[2][1])[0]
        return [token for token in self.encode_text(after) if token in self.marker_ids][:1]

    def encode_text(self, text: str) -> list[int]:
        """The ids of a rendered text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _joined(spans: list[Span]) -> list[Span]:
    """Join adjacent spans: a template may mark a reply and its end marker separately."""
    joined: list[Span] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def _tokens_of(spans: list[Span], offsets: list[Span]) -> list[Span]:
    """Convert spans of characters to spans of tokens, including every token that overlaps one."""
    begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    firsts = np.searchsorted(ends, [begin for begin, _ in spans], side="right").tolist()
    lasts = np.searchsorted(begins, [end for _, end in spans], side="left").tolist()
    return list(zip(firsts, lasts, strict=True))


def chat_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> ChatTokenizer:
    """The `ChatTokenizer` for a transformers tokenizer and its template.

    Raises:
        DataError: the tokenizer has no `tokenizers` backend, or several templates and no default one.
    """
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        raise DataError(
            f"a {type(tokenizer).__name__} does not report which characters its tokens cover",
            "without that it is not known which tokens belong to the assistant",
            "use a tokenizer with a tokenizer.json",
        )
    backend: Any = tokenizer
    return ChatTokenizer(Tokenizer.from_str(backend.backend_tokenizer.to_str()), template_of(tokenizer))


def template_of(tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate:
    """A tokenizer's chat template, and the special tokens that it can refer to.

    Raises:
        DataError: it has no template, several without a default, or one that is not text.
    """
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    try:
        template: Any = tokenizer.get_chat_template()
        if not isinstance(template, str):
            raise TypeError(f"{template!r} is not text")
        return ChatTemplate(template, names)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"the tokenizer has no default chat template: {str(error)[:200]}",
            "a template is needed to turn a conversation into text",
            "set `chat_template: minichat`, or give the path of a Jinja file",
        ) from error


def stop_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that end an assistant's turn.

    Returns:
        The first special or added token that the chat template writes after a reply, if any, then the end token.
    """
    has_template = tokenizer.chat_template is not None and tokenizer.is_fast
    ids = chat_tokenizer(tokenizer).end_ids() if has_template else []
    return list(dict.fromkeys([*ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]))
