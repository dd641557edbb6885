"""`minima chat`: a conversation in the terminal, or one question per line if the input is a file or a pipe.

In the terminal the answer appears as it is generated, and notes are in brackets; `/help` lists the commands. Ctrl-C
ends the answer, Ctrl-D the program. In line mode standard output holds only the answers. An empty line follows each
answer, and none occurs inside one, so that a script can separate them; an empty answer is just the empty line. Notes go
to standard error. Every line that is neither blank nor a command is a question, even `/etc/hosts?`.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from minima.console import plain
from minima.errors import DataError, MinimaError

HELP = """/reset  forget the conversation (a system message is kept)
/exit   quit; so does Ctrl-D
/help   show this
Ctrl-C  end the answer; the part already written stays in the conversation"""
_COMMANDS = ("/reset", "/exit", "/quit", "/help")
Message = dict[str, str]


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
    """Options from the command line."""

    system: str | None = None  # message that opens the conversation; none if not given
    max_new_tokens: int = 512  # of one answer
    temperature: float | None = None  # if not given, as the model's folder suggests; 0 always takes the likeliest token
    top_p: float | None = None  # if not given, as the model's folder suggests
    seed: int | None = None  # of the sampling; if not given, a different one each time
    plain: bool = False  # let the model continue each text, without a chat template or a conversation


class Conversation:
    """One person's conversation with a model.

    Raises:
        DataError: the model has no chat template and `plain` is not set, or a setting is invalid.
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
        """Show the person a note that is not part of an answer."""
        self._notes.write(f"[{plain(text)}]\n")
        self._notes.flush()

    def command(self, text: str) -> bool:
        """Execute a command line that begins with `/`; False if it asks to quit."""
        if text in ("/exit", "/quit"):
            return False
        if text == "/reset":
            self.reset()
            self.note("a new conversation")
        else:
            self.note(HELP if text == "/help" else f"{text.split()[0]} is not a command; the commands are:\n{HELP}")
        return True

    def skip(self, why: str) -> None:
        """Leave a question unanswered, with an empty line in place of the answer."""
        self.note(why)
        self._out.write("\n")
        self._out.flush()

    def ask(self, text: str, *, whole: bool) -> None:
        """Write the answer to one question.

        Args:
            text: the question, or the text to continue.
            whole: write the answer in one piece without empty lines, instead of as it is generated.

        Raises:
            DataError: the question is too long, or the template refuses it; it is not added to the conversation.
        """
        messages = self._fitted(text)
        pieces: list[str] = []
        interrupted = False
        with closing(self._answer(messages, text)) as answer:  # closing it also stops the model
            try:
                for piece in answer:
                    pieces.append(plain(piece))
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
        """The conversation with its new question, shortened to what the model can read."""
        messages = [*self._messages, {"role": "user", "content": text}]
        if self._settings.plain:
            return messages
        kept, dropped = self._speaker.fit(messages, self._settings.max_new_tokens)
        if dropped:
            self.note(f"the conversation exceeds the model's window: the first {dropped} messages are forgotten")
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


def talk(conversation: Conversation, read: Callable[[str], str]) -> None:
    """Run the conversation until the person ends it.

    Args:
        read: returns the next line, given the prompt to show (like `input`).
    """
    conversation.note("/help shows the commands")
    while True:
        try:
            text = read("> ").strip()
            if text.startswith("/"):
                if not conversation.command(text):
                    return
            elif text:
                conversation.ask(text, whole=False)
        except EOFError:
            conversation.note("end of conversation")
            return
        except KeyboardInterrupt:  # while no answer was being generated
            conversation.note("press Ctrl-D or type /exit to quit")
        except MinimaError as error:
            conversation.note(f"{error.what}; {error.do}")


def answer_lines(conversation: Conversation, lines: TextIO) -> None:
    """Answer each line of a file or a pipe until its end, or until nobody reads the output any more.

    Raises:
        DataError: some lines were too long or were refused; these have no answer, but all others have.
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
            raise DataError(
                f"the input is not UTF-8 ({error})", "it cannot be read as text", "convert it to UTF-8"
            ) from error
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
            "it is a base model: it continues a text, and was not trained to answer",
            "use --plain to let it continue your text, or give the export of a model trained by an instruct stage",
        )
    if settings.plain and settings.system:
        raise DataError(
            "a system message with --plain",
            "without a conversation it would have no effect",
            "remove one of the two",
        )
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
            "no answer can be generated with it",
            "--max-new-tokens must be at least 1, --temperature at least 0, --top-p above 0 and at most 1",
        )
