"""What reaches the terminal, and what a terminal does: escapes, encodings, full disks, Ctrl-C."""

import io
import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.table import Table

from odtrt_lib.app import cli, terminal
from odtrt_lib.errors import InputError, printable, shell_word

HOSTILE = "a\x1b]0;x\x07\x9b2J\u202eb\ud800\udce8\r\n\u2028c"
SHOWN = r"a\x1b]0;x\x07\x9b2J\u202eb\ud800\xe8\r\n\u2028c"


def test_what_acts_is_shown_and_what_shows_is_left():
    assert printable(HOSTILE) == SHOWN
    for text in ("plain text", "болт", "螺母", "ترس", "पहि\u200dया", "é", "e\u0301", "→ ✓ × 10⁻⁹"):
        assert printable(text) == text


def test_no_character_of_unicode_acts_on_a_terminal():
    """By Unicode's own property: bidirectional controls, C0, C1, surrogates, separators."""
    acting = {"BN", "B", "S", "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for number in (*range(0x3000), *range(0xD800, 0xE000), *range(0xFE00, 0x10000), *range(0xE0000, 0xE0200)):
        for one in printable(chr(number)):
            if one not in "\u200c\u200d" and unicodedata.category(one) != "Cn":
                assert unicodedata.bidirectional(one) not in acting, hex(number)
                assert not 0xD800 <= ord(one) < 0xE000


def test_every_way_into_the_console_is_shown():
    stream = io.StringIO()
    console = terminal.SafeConsole(file=stream, width=400)
    console.print(HOSTILE, markup=False)
    console.print(HOSTILE)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    for acting in ("\x1b", "\x9b", "\u202e", "\x07", "\ud800", "\r"):
        assert acting not in stream.getvalue()
    assert stream.getvalue().count(r"a\x1b]0;x") == 5


@pytest.mark.parametrize(
    "name", ["plain", "two words", "a; touch PWN", "it's", "a\nb", "\x1b[2J", "b\\s\x07'"]
)
def test_a_word_of_a_command_is_read_back_by_a_shell(name):
    word = shell_word(name)
    assert printable(word) == word
    back = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert back.stdout == os.fsencode(name)


def odtrt(code: str, **options) -> subprocess.CompletedProcess:
    """Runs a stand-in for `odtrt export`, whose work is ``code``, in a process of its own."""
    script = (
        "import os, sys, types\nimport odtrt_lib\nfrom odtrt_lib.app import cli\n"
        f"def work(source, target, **_):\n    {code}\n"
        "stage = odtrt_lib.export = sys.modules['odtrt_lib.export'] = types.SimpleNamespace(export=work)\n"
        "cli.main(['export', 'model', '-o', 'out'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2]), **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True, **options
    )


RAISE = "raise cli.InputError('螺母: bad')"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_stream_of_any_encoding_takes_any_name(encoding):
    done = odtrt(RAISE, stdout=subprocess.PIPE, encoding=encoding, env={"PYTHONIOENCODING": encoding})
    shown = "螺母" if encoding == "utf-8" else r"\u87ba\u6bcd"
    assert (done.returncode, done.stderr) == (1, f"error: {shown}: bad\n")


def test_closed_and_full_streams():
    closed = odtrt(RAISE, preexec_fn=lambda: os.close(1))
    assert (closed.returncode, closed.stderr) == (1, "error: 螺母: bad\n")
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = odtrt("pass", stdout=full)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert (
            done.stderr.startswith("error: standard output: ") and "(No space left on device)" in done.stderr
        )
        command = [sys.executable, "-m", "odtrt_lib", "--version"]
        silent = subprocess.run(command, stdout=full, stderr=full, env={**os.environ})
        assert silent.returncode == 1


def test_an_error_of_the_operating_system_is_no_defect():
    done = odtrt("open('/nonexistent/x')", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "/nonexistent/x: " in done.stderr and "No such file" in done.stderr


INTERRUPT = "os.kill(os.getpid(), 2)"
IN_A_WEAK_REFERENCE = f"""
    import signal, time, weakref
    class Thing: pass
    thing = Thing()
    kept = weakref.ref(thing, lambda _: {INTERRUPT})
    del thing
    for _ in range(6000): time.sleep(0.1)
"""
IN_A_DESTRUCTOR = f"""
    import time
    class Thing:
        def __del__(self): {INTERRUPT}
    Thing()
    for _ in range(6000): time.sleep(0.1)
"""
TURNED_INTO_ANOTHER = f"""
    try:
        {INTERRUPT}
        for _ in range(10): pass
    except BaseException as error:
        raise ImportError("initialization failed") from error
"""


def heed_ctrl_c() -> None:
    """A shell starts its background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    "code",
    [INTERRUPT, IN_A_WEAK_REFERENCE, IN_A_DESTRUCTOR, TURNED_INTO_ANOTHER],
    ids=["in the open", "weak reference", "destructor", "turned into another"],
)
def test_ctrl_c_ends_the_command_wherever_it_falls(code):
    done = odtrt(code.strip(), stdout=subprocess.PIPE, preexec_fn=heed_ctrl_c)
    assert (done.returncode, done.stderr) == (130, "interrupted; nothing half-written is left\n")


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    (tmp_path / "typer.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(600)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(cli.__file__).parents[2]}"}
    done = subprocess.run(
        [sys.executable, "-m", "odtrt_lib", "--version"],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; nothing half-written is left\n"


def test_the_handler_of_others_is_left_alone():
    mine = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with terminal.heeding_ctrl_c():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, mine)
    with terminal.heeding_ctrl_c():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_wrong_argument_is_shown_not_sent(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["\x1b]0;evil\x07"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "\x1b" not in err and r"\x1b]0;evil" in err


def test_a_full_stream_is_an_input_error():
    with open("/dev/full", "w") as full, pytest.raises(InputError, match="standard output"):  # noqa: PTH123
        terminal.SafeConsole(file=full).print("x")
