"""Chat templates: a conversation as text, what of it the assistant says, and the ids that end its turn."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minima.assets import read_template
from minima.data.conversations import ASSISTANT, USER, Turn, Unfit
from minima.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

MINICHAT, OWN = "minichat", "own"
_MINICHAT_MARKS = ("[|User|]", "[|Assistant|]")
_PROBE: list[Turn] = [(USER, "one"), (ASSISTANT, "two"), (USER, "three"), (ASSISTANT, "four")]
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BEGIN = "{{- bos_token -}}\n"

Span = tuple[int, int]


class TokenizedChat(NamedTuple):
    """One conversation.

    Attributes:
        ids: its tokens: what the tokenizer's own `apply_chat_template` gives.
        replies: for each assistant turn, its first token and one past its last, the end marker included.
        text: what the tokens are of.
    """

    ids: list[int]
    replies: list[Span]
    text: str


class ChatTemplate(NamedTuple):
    """A Jinja chat template and what it can name; goes to worker processes.

    Attributes:
        text: the template.
        special_tokens: `eos_token` and its like.
    """

    text: str
    special_tokens: dict[str, str]

    def render(self, turns: list[Turn], *, prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            turns: role and text of each.
            prompt: end with what comes before an assistant's answer.

        Raises:
            jinja2.TemplateError: the template cannot be read, or refuses the conversation.
        """
        return self._render(turns, prompt=prompt)[0]

    def replies(self, turns: list[Turn]) -> tuple[str, list[Span]]:
        """The text of a conversation, and in it the assistant's turns with their end markers, by characters.

        They are what the template marks by `{% generation %}`. Of a template without these marks, a reply begins where
        the text of the turns before it ends, and what is written after it belongs to it, but no white space at the end.

        Raises:
            jinja2.TemplateError: the template cannot be read, or refuses the conversation.
            Unfit: the text of the first turns is not how the text of all of them begins.
        """
        if _MARKED.search(self.text):
            text, spans = self._render(turns, spans=True)
            if len(spans) != sum(role == ASSISTANT for role, _ in turns):
                raise Unfit("not_splittable")
            return text, spans
        text = self.render(turns)
        spans = []
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
        except (TypeError, ValueError, KeyError) as error:  # a template can add a string to a number
            raise TemplateError(str(error)) from error
        texts, found = rendered
        return texts[0], found[0] if spans else []


class ChatTokenizer:
    """Conversations -> ids, with the tokenizer of a folder and without transformers' start.

    Args:
        tokenizer: the fast tokenizer; names of special tokens in the template's text are these tokens.
        template: the chat template.

    Attributes:
        special_ids: of the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: "Tokenizer", template: ChatTemplate) -> None:
        tokenizer.encode_special_tokens = False
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self.template = tokenizer, template
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = {number for number, token in added.items() if token.special}
        special = [added[number].content for number in self.special_ids]
        marks = [mark for mark in _MINICHAT_MARKS if mark in template.text]
        self._forged = re.compile("|".join(re.escape(mark) for mark in sorted({*special, *marks})) or r"(?!)")

    def forges(self, turns: list[Turn]) -> bool:
        """Whether a text holds the name of a special token or of a marker, by which it could open or end a turn."""
        return any(self._forged.search(text) for _, text in turns)

    def encode(self, conversations: list[list[Turn]]) -> list[TokenizedChat | Unfit]:
        """Tokenize conversations; in the place of one that the template cannot take, why."""
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

    def encode_text(self, text: str) -> list[int]:
        """The ids of a rendered text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _tokens_of(spans: list[Span], offsets: list[Span]) -> list[Span]:
    """Spans of characters as spans of tokens: all that have a character in it."""
    begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    firsts = np.searchsorted(ends, [begin for begin, _ in spans], side="right").tolist()
    lasts = np.searchsorted(begins, [end for _, end in spans], side="left").tolist()
    return list(zip(firsts, lasts, strict=True))


# -- which template ----------------------------------------------------------------------------------------------


def set_template(tokenizer: "PreTrainedTokenizerBase", chosen: str | None) -> None:
    """Give a tokenizer its chat template, after a look at whether conversations can be learnt in it.

    Args:
        tokenizer: is changed; saved with `save_pretrained`, the template lies beside it.
        chosen: `minichat`, `own`, the path of a Jinja file, or None for the tokenizer's own where it has one.

    Raises:
        DataError: there is no such template, the template refuses a plain conversation, its text cannot be split into
            turns, or it writes nothing after a reply.
    """
    own = tokenizer.chat_template is not None
    name = chosen or (OWN if own else MINICHAT)
    if name == MINICHAT:
        adds_begin = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
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


def chat_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> ChatTokenizer:
    """The same tokenizer and template, as workers use them.

    Raises:
        DataError: the tokenizer has no `tokenizers` backend.
    """
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        raise DataError(
            f"a {type(tokenizer).__name__} does not tell which characters its tokens are",
            "so it cannot be told which tokens the assistant says",
            "use a tokenizer with a tokenizer.json",
        )
    backend: Any = tokenizer
    return ChatTokenizer(Tokenizer.from_str(backend.backend_tokenizer.to_str()), template_of(tokenizer))


def template_of(tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate:
    """A tokenizer's chat template, and the special tokens that it can name."""
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return ChatTemplate(tokenizer.get_chat_template(), names)


def stop_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that end an assistant's turn.

    Returns:
        What the chat template writes after a reply, where that is a special token, then the end token.
    """
    ids: list[int] = []
    if tokenizer.chat_template is not None:
        chat = chat_tokenizer(tokenizer)
        (probe,) = chat.encode([_PROBE])
        if isinstance(probe, TokenizedChat):
            end = probe.replies[0][1]
            ids = [token for token in probe.ids[end - 1 : end + 1] if token in chat.special_ids][:1]
    return list(dict.fromkeys([*ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]))


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

    mend = "set `chat_template: minichat`, or mend the template"
    try:
        text, replies = chat.template.replies(_PROBE)
        prompts = [chat.template.render(_PROBE[:turns], prompt=True) for turns in (1, 3)]
    except TemplateError as error:
        raise DataError(
            f"the chat template ({name}) refuses a conversation of two exchanges: {error}",
            "none could be learnt in it",
            mend,
        ) from error
    except Unfit as error:
        raise DataError(
            f"the chat template ({name}) writes earlier turns in another way once there are later ones, or marks more "
            "or fewer replies than there are",
            "so it cannot be told which of the text the assistant says",
            f"{mend} (put its replies between {{% generation %}} and {{% endgeneration %}})",
        ) from error
    ids = chat.encode_text(text)
    for prompt in prompts:
        asked = chat.encode_text(prompt)
        if not text.startswith(prompt) or ids[: len(asked)] != asked:
            raise DataError(
                f"the chat template ({name}) asks for an answer with {prompt[-40:]!r}, whose tokens are not those of "
                "the answered conversation",
                "the model would be asked in another way than it learns",
                mend,
            )
    if any(text[begin:end].endswith(answer) for (begin, end), (_, answer) in zip(replies, _PROBE[1::2], strict=True)):
        raise DataError(
            f"the chat template ({name}) has no end marker in {text!r}, or does not mark it as the reply's",
            "a model would never learn to stop",
            mend,
        )
