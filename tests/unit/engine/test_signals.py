"""A first signal is a wish, its echo is the same one, and a second one ends the process."""

import signal
import subprocess
import sys
import time

CODE = """
import time
from minima.engine.signals import StopRequest
stop = StopRequest().listen()
print("listening", flush=True)
while not stop.requested:
    time.sleep(0.01)
print(stop.signal, flush=True)
time.sleep(30)
"""


def process(hang_up: str = "--default-signal=HUP") -> subprocess.Popen:
    # These tests themselves may run under nohup.
    child = subprocess.Popen(["env", hang_up, sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "listening\n"
    return child


def test_the_first_is_noted_and_a_later_one_ends_at_once():
    child = process()
    child.send_signal(signal.SIGTERM)
    assert child.stdout is not None and child.stdout.readline() == "15\n"
    child.send_signal(signal.SIGINT)  # an echo: launchers hand on what their ranks have had
    time.sleep(2.2)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=5) == 128 + signal.SIGINT


def test_an_interrupt_from_the_keyboard_is_a_wish_too():
    child = process()
    child.send_signal(signal.SIGINT)
    assert child.stdout is not None and child.stdout.readline() == "2\n"
    child.kill()
    child.wait()


def test_the_end_of_the_terminal_is_a_wish_too_and_never_a_second_one():
    child = process()
    child.send_signal(signal.SIGHUP)
    assert child.stdout is not None and child.stdout.readline() == "1\n"
    time.sleep(2.2)
    child.send_signal(signal.SIGHUP)  # the system tells of it, and the shell does
    time.sleep(0.2)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=5) == 128 + signal.SIGTERM


def test_under_nohup_a_terminal_may_go():
    child = process("--ignore-signal=HUP")
    child.send_signal(signal.SIGHUP)
    child.send_signal(signal.SIGTERM)
    assert child.stdout is not None and child.stdout.readline() == "15\n"
    child.kill()
    child.wait()
