"""`minima chat`: a conversation in the terminal, or one question a line where the input is a file or a pipe.

What a person sees: the answer as it is written, and notes in brackets; `/help` lists the commands. Ctrl-C ends the
answer, Ctrl-D the program. In line mode standard output holds the answers alone, each closed by one empty line and
without one inside it, so that a script can tell them apart: an answer that is empty is the empty line alone. Notes go
to standard error. Every line that is neither blank nor one of the commands is a question, `/etc/hosts?` too.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from minima.errors import DataError, MinimaError

HELP = """/reset  forget the conversation (a system message stays)
/exit   end; Ctrl-D does, too
/help   show this
Ctrl-C  end the answer; what was written of it stays in the conversation"""
_COMMANDS = ("/reset", "/exit", "/quit", "/help")
Message = dict[str, str]
_UNPRINTABLE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])  # a model may spell out terminal controls


class Speaker(Protocol):
    """The part of a `Generator` that a conversation needs."""

    has_template: bool
    temperature: float
    top_p: float

    def stream(
        self, messages: list[Message], *, max_new_tokens: int, temperature: float, top_p: float, seed: int | None
    ) -> Iterator[str]: ...

    def continue_text(
        self, text: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int | None
    ) -> Iterator[str]: ...

    def fit(self, messages: list[Message], max_new_tokens: int) -> tuple[list[Message], int]: ...


@dataclass(frozen=True)
class ChatSettings:
    """What the command line says.

    Attributes:
        system: message that opens the conversation; none when not given.
        max_new_tokens: of one answer.
        temperature: as the model's folder suggests when not given; 0 always takes the likeliest token.
        top_p: as the model's folder suggests when not given.
        seed: of the sampling; another one each time when not given.
        plain: let the model go on with each text, without a chat template and without a conversation.
    """

    system: str | None = None
    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    plain: bool = False


class Conversation:
    """One person's talk with a model.

    Raises:
        DataError: the model has no chat template, and `plain` is not set; or the settings make no sense.
    """

    def __init__(self, speaker: Speaker, settings: ChatSettings, out: TextIO, notes: TextIO) -> None:
        self._speaker, self._settings, self._out, self._notes = speaker, settings, out, notes
        self._seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
        _check(settings, speaker.has_template)
        self._messages: list[Message]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages = [{"role": "system", "content": self._settings.system}] if self._settings.system else []

    def note(self, text: str) -> None:
        """Tell the person something that the model did not say."""
        self._notes.write(f"[{text}]\n")
        self._notes.flush()

    def command(self, text: str) -> bool:
        """Do what a line that begins with `/` says; False when it says to end."""
        if text in ("/exit", "/quit"):
            return False
        if text == "/reset":
            self.reset()
            self.note("a new conversation")
        else:
            self.note(HELP if text == "/help" else f"{text.split()[0]} is no command; these are:\n{HELP}")
        return True

    def skip(self, why: str) -> None:
        """Leave a question without an answer: in a pipe, an empty line in its place."""
        self.note(why)
        self._out.write("\n")
        self._out.flush()

    def ask(self, text: str, *, whole: bool) -> None:
        """Write the answer to one question.

        Args:
            text: the question, or the text to go on from.
            whole: write it in one piece without empty lines, instead of as it comes.

        Raises:
            DataError: the question is too long, or the template refuses it; it is then no part of the conversation.
        """
        messages = self._fitted(text)
        pieces: list[str] = []
        interrupted = False
        with closing(self._answer(messages, text)) as answer:  # closing it ends the model's work, too
            try:
                for piece in answer:
                    pieces.append(piece.translate(_UNPRINTABLE))
                    if not whole:
                        self._out.write(pieces[-1])
                        self._out.flush()
            except KeyboardInterrupt:
                if whole:
                    raise
                interrupted = True
        said = "".join(pieces).strip()
        lines = [f"{line}\n" for line in said.splitlines() if line.strip()] if whole else []
        self._out.write("".join(lines) + "\n")
        self._out.flush()
        if interrupted:
            self.note("interrupted")
        if not self._settings.plain and said:
            self._messages = [*messages, {"role": "assistant", "content": said}]

    def _fitted(self, text: str) -> list[Message]:
        """The conversation with its new question, as much of it as the model can read."""
        messages = [*self._messages, {"role": "user", "content": text}]
        if self._settings.plain:
            return messages
        kept, dropped = self._speaker.fit(messages, self._settings.max_new_tokens)
        if dropped:
            self.note(f"longer than the model can read: the first {dropped} messages are forgotten")
        return kept

    def _answer(self, messages: list[Message], text: str) -> Any:
        settings, speaker = self._settings, self._speaker
        options: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "temperature": speaker.temperature if settings.temperature is None else settings.temperature,
            "top_p": speaker.top_p if settings.top_p is None else settings.top_p,
            "seed": self._seed,
        }
        self._seed += 1
        return speaker.continue_text(text, **options) if settings.plain else speaker.stream(messages, **options)


def talk(conversation: Conversation, read: Callable[[str], str], prompt: str = "> ") -> None:
    """Talk until the person ends it.

    Args:
        conversation: with a model.
        read: gives the next line; is told what to show before it (`input` does so).
        prompt: what to show.
    """
    conversation.note("/help shows the commands")
    while True:
        try:
            text = read(prompt).strip()
            if text.startswith("/"):
                if not conversation.command(text):
                    return
            elif text:
                conversation.ask(text, whole=False)
        except EOFError:
            conversation.note("the end")
            return
        except KeyboardInterrupt:  # while nothing was being answered
            conversation.note("Ctrl-D or /exit ends")
        except MinimaError as error:
            conversation.note(f"{error.what}; {error.do}")


def answer_lines(conversation: Conversation, lines: TextIO) -> None:
    """Answer each line of a file or a pipe, up to its end; a reader that goes away ends it, too.

    Raises:
        DataError: lines were too long, or were refused; they have no answer, and those after them have.
    """
    number, refused = 0, list[DataError]()
    while True:
        number += 1
        try:
            line = lines.readline()
            text = line.strip()
            if not line or (text in _COMMANDS and not conversation.command(text)):
                break
            if text in _COMMANDS:
                continue
            if text:
                conversation.ask(text, whole=True)
        except BrokenPipeError:
            return
        except UnicodeDecodeError as error:
            raise DataError(f"the input is not UTF-8 ({error})", "it cannot be read as text", "convert it") from error
        except DataError as error:
            refused.append(DataError(f"line {number} of the input: {error.what}", error.why, error.do))
            try:
                conversation.skip(refused[-1].what)
            except BrokenPipeError:
                return
    if refused:
        raise refused[0]


def _check(settings: ChatSettings, has_template: bool) -> None:
    if not settings.plain and not has_template:
        raise DataError(
            "this model has no chat template",
            "it is a base model: it goes on with a text, and was not taught to answer",
            "let it go on with what you type: --plain; or give the export of a model that instruct has trained",
        )
    if settings.plain and settings.system:
        raise DataError("a system message with --plain", "without a conversation nobody would read it", "drop one")
    wrong = [
        f"{name} {value:g}"
        for name, value, lowest, highest in (
            ("--max-new-tokens", settings.max_new_tokens, 1, float("inf")),
            ("--temperature", settings.temperature, 0, float("inf")),
            ("--top-p", settings.top_p, 1e-9, 1),
        )
        if value is not None and not lowest <= value <= highest
    ]
    if wrong:
        raise DataError(
            ", ".join(wrong),
            "no answer can be made so",
            "--max-new-tokens is at least 1, --temperature at least 0, --top-p above 0 and at most 1",
        )
