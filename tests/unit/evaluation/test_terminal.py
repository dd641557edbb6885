"""What a person and a script see of a conversation, with a model that says what it is told to say."""

import io

import pytest

from minima.errors import DataError
from minima.evaluation.terminal import ChatSettings, Conversation, answer_lines, talk


class Echo:
    """Answers with the number of messages and the last question, word by word."""

    has_template, temperature, top_p = True, 0.7, 0.9

    def __init__(self, keep=99):
        self.keep, self.seen, self.options, self.closed = keep, [], [], 0

    def fit(self, messages, max_new_tokens):
        kept = messages[-self.keep :]
        return kept, len(messages) - len(kept)

    def stream(self, messages, **options):
        self.seen.append([message["content"] for message in messages])
        self.options.append(options)
        return self._words(f"{len(messages)} {messages[-1]['content']}")

    def continue_text(self, text, **options):
        self.options.append(options)
        return self._words(f"{text} on")

    def _words(self, text):
        try:
            if "too long" in text:
                raise DataError("the question is too long", "why", "make it shorter")
            for word in text.replace("|", "\n").split(" "):
                yield word + " "
                if word == "stop":
                    raise KeyboardInterrupt
        finally:
            self.closed += 1


class Refusing(Echo):
    def fit(self, messages, max_new_tokens):
        raise DataError("the template says \x1b]0;owned\x07", "why", "fix it")


def typed(*lines):
    """What a person types, one after another; an exception is what a key does."""
    left = iter(lines)

    def read(prompt):
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def person(speaker, *lines, **settings):
    out = io.StringIO()
    talk(Conversation(speaker, ChatSettings(**settings), out, out), typed(*lines))
    return out.getvalue()


def script(speaker, text, **settings):
    out, notes = io.StringIO(), io.StringIO()
    answer_lines(Conversation(speaker, ChatSettings(**settings), out, notes), io.StringIO(text))
    return out.getvalue(), notes.getvalue()


def test_a_conversation_remembers_until_it_is_reset():
    echo = Echo()
    text = person(echo, "one", "", "two", "/reset", "three", system="be short")
    assert echo.seen == [["be short", "one"], ["be short", "one", "2 one", "two"], ["be short", "three"]]
    assert "2 one" in text
    assert "[a new conversation]" in text
    assert text.rstrip().endswith("[end of conversation]")


def test_commands():
    echo = Echo()
    text = person(echo, "/help", "/frobnicate now", "/exit", "never asked")
    assert not echo.seen
    assert text.count("/reset  forget") == 2
    assert "/frobnicate is not a command" in text


def test_control_c_ends_the_answer_and_what_was_said_stays():
    echo = Echo()
    text = person(echo, "please stop here", KeyboardInterrupt(), "more")
    assert "here" not in text.split("[interrupted]")[0]
    assert "[press Ctrl-D or type /exit to quit]" in text
    assert echo.seen[1] == ["please stop here", "1 please stop", "more"]
    assert echo.closed == 2


def test_a_question_that_cannot_be_answered_is_no_part_of_the_conversation():
    echo = Echo()
    text = person(echo, "too long", "short")
    assert "[the question is too long; make it shorter]" in text
    assert echo.seen[1] == ["short"]


def test_forgotten_messages_are_told_once():
    text = person(Echo(keep=3), "one", "two", "three", "four")
    assert text.count("the first 2 messages are forgotten") == 2


def test_the_folders_sampling_holds_unless_told_otherwise():
    echo = Echo()
    person(echo, "a", "b", seed=5)
    person(echo, "a", seed=5, temperature=0.0, top_p=0.5, max_new_tokens=3)
    first, second, other = echo.options
    assert first == {"max_new_tokens": 512, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    assert second["seed"] == 6
    assert other == {"max_new_tokens": 3, "temperature": 0.0, "top_p": 0.5, "seed": 5}


def test_lines_in_paragraphs_out():
    out, notes = script(Echo(), "one||two\n\n/reset\nthree\n")
    assert out == "1 one\ntwo\n\n1 three\n\n", "an empty line ends an answer, and is in none"
    assert notes == "[a new conversation]\n"


def test_an_empty_answer_is_an_empty_line():
    class Silent(Echo):
        def _words(self, text):
            yield "" if "two" in text else text

    assert script(Silent(), "one\ntwo\nthree\n")[0] == "1 one\n\n\n3 three\n\n"
    assert script(Silent(), "two\ntwo\n", plain=True)[0] == "\n\n"


def test_a_line_that_is_no_command_is_a_question():
    out, notes = script(Echo(), "/etc/hosts?\n/reset\n/resets\n/help\n/quit\nnever asked\n")
    assert out == "1 /etc/hosts?\n\n1 /resets\n\n"
    assert "is not a command" not in notes


def test_lines_end_with_the_input_or_by_command():
    assert script(Echo(), "")[0] == ""
    assert script(Echo(), "one\n/exit\ntwo\n")[0] == "1 one\n\n"
    assert script(Echo(), "one")[0] == "1 one\n\n", "without a line's end, too"


def test_a_line_that_cannot_be_answered_is_named():
    out, notes = io.StringIO(), io.StringIO()
    conversation = Conversation(Echo(), ChatSettings(), out, notes)
    with pytest.raises(DataError, match="line 3 of the input: the question is too long"):
        answer_lines(conversation, io.StringIO("one\n\ntoo long\ntwo\n"))
    assert out.getvalue() == "1 one\n\n\n3 two\n\n", "an empty line for what has no answer, and the lines after it"
    assert "line 3 of the input" in notes.getvalue()


def test_input_that_is_no_text():
    lines = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8")
    conversation = Conversation(Echo(), ChatSettings(), io.StringIO(), io.StringIO())
    with pytest.raises(DataError, match="not UTF-8"):
        answer_lines(conversation, lines)


def test_a_reader_that_goes_away_ends_it():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    echo = Echo()
    answer_lines(Conversation(echo, ChatSettings(), Gone(), io.StringIO()), io.StringIO("one\ntwo\n"))
    assert len(echo.seen) == 1


def test_terminal_controls_are_not_passed_on():
    assert script(Echo(), "a\x1b[2Jb\x07")[0] == "1 a[2Jb\n\n"
    assert "\n[the template says ]0;owned; fix it]\n" in person(Refusing(), "hello")


def test_plain_lets_the_model_go_on_and_remembers_nothing():
    echo = Echo()
    echo.has_template = False
    assert script(echo, "once upon\na time\n", plain=True)[0] == "once upon on\n\na time on\n\n"
    assert not echo.seen


@pytest.mark.parametrize(
    ("template", "settings", "words"),
    [
        (False, {}, "--plain"),
        (True, {"plain": True, "system": "s"}, "system message with --plain"),
        (True, {"max_new_tokens": 0}, "--max-new-tokens 0"),
        (True, {"temperature": -1.0}, "--temperature -1"),
        (True, {"temperature": float("nan")}, "--temperature nan"),
        (True, {"top_p": 0.0}, "--top-p 0"),
        (True, {"top_p": 1.5}, "--top-p 1.5"),
    ],
)
def test_what_makes_no_sense_is_refused(template, settings, words):
    echo = Echo()
    echo.has_template = template
    with pytest.raises(DataError, match=words):
        Conversation(echo, ChatSettings(**settings), io.StringIO(), io.StringIO())
