"""A conversation: what the model reads of it, what the commands do, and how the terminal is treated."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from minillm import cli
from minillm.cli.chat import COMMANDS, Session, obey
from minillm.cli.conversation import Message, Rendered, continuation, fitting, read_conversation
from minillm.generate.generate import generate
from minillm.generate.params import SamplingParams
from minillm.load import save
from minillm.log import run_command
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
A, B = Message("user", "one red hen"), Message("assistant", " sat down.")
SYSTEM = Message("system", "A story.")
CTRL_C = b"\x03"


def make_model(max_seq_len=64):
    """Greedily it says letters for ever: of two letters whose rows are opposite, one is likelier than all the rest."""
    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "tie_embeddings": False}
    model = Transformer(ModelConfig(vocab_size=272, max_seq_len=max_seq_len, **shape))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        rows = model.lm_head.weight[TOKENIZER.encode("abcd")].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[TOKENIZER.encode("abcdefgh")] = torch.cat([rows, -rows])
    return model.eval()


def make_session(*messages, max_seq_len=64, **params):
    return Session(make_model(max_seq_len), TOKENIZER, SamplingParams(temperature=0, **params), list(messages))


# --- what the model reads ---------------------------------------------------------------------------------------------


def test_a_conversation_is_a_text_that_the_model_continues():
    tokens, stops = continuation(TOKENIZER, [SYSTEM, A, B, A])
    assert tokens == [TOKENIZER.bos_id, *TOKENIZER.encode("A story.\none red hen sat down.\none red hen")]
    assert stops == ()


def test_what_is_said_never_becomes_a_special_token():
    tokens = continuation(TOKENIZER, [Message("user", "</s><|im_end|>")]).tokens
    assert tokens[0] == TOKENIZER.bos_id
    assert not set(tokens[1:]) & set(TOKENIZER.special_tokens.values())


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_the_oldest_messages_are_left_out_where_there_is_no_room(system):
    """As few as possible, never the system message, and an answer with its question."""
    said = [*system, *[A, B] * 7, A]
    for room in range(40, 220):
        rendered, n_left_out = fitting(continuation, TOKENIZER, said, room)
        rest = said[len(system) + n_left_out :]
        assert rendered == continuation(TOKENIZER, [*system, *rest])
        assert len(rendered.tokens) <= room
        assert rest[0] == A
        if n_left_out:
            more = [*system, *said[len(system) + n_left_out - 2 :]]
            assert len(continuation(TOKENIZER, more).tokens) > room
    assert n_left_out == 0


def test_a_message_that_does_not_fit_alone_is_refused_and_not_kept():
    with pytest.raises(ValueError, match="the message takes 12 tokens, and there is room for 11 before an answer"):
        fitting(continuation, TOKENIZER, [A, B, A], 11)
    session = make_session(A, B)
    with pytest.raises(ValueError, match="there is room for 48"):
        session.answer("x" * 64)
    assert session.messages == [A, B]


def test_an_answer_continues_the_whole_conversation_and_joins_it():
    session = make_session(SYSTEM, max_new_tokens=5)
    expected = generate(session.model, TOKENIZER, "A story.\none red hen", session.params).text
    first = "".join(session.answer(A.content))
    assert first == expected
    assert len(first) == 5
    second = "".join(session.answer("and"))
    assert second == generate(session.model, TOKENIZER, f"A story.\none red hen{first}\nand", session.params).text
    roles = [message.role for message in session.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_an_answer_that_is_not_heard_to_its_end_is_kept_as_far_as_it_was():
    session = make_session(max_new_tokens=8)
    pieces = session.answer("hen")
    heard = next(pieces) + next(pieces)
    pieces.close()
    assert session.messages == [Message("user", "hen"), Message("assistant", heard)]
    session.answer("and")  # not listened to at all
    assert len(session.messages) == 2


def test_the_context_never_overflows_however_long_the_chat():
    session = make_session()
    left_out = []
    for _ in range(9):
        assert "".join(session.answer("one red hen"))
        left_out.append(session.n_left_out)
    assert left_out[0] == 0 < left_out[-1]
    assert left_out == sorted(left_out)
    assert len(session.messages) == 18


def test_a_template_decides_what_is_read_and_where_an_answer_stops():
    session = make_session(max_new_tokens=30)
    always = TOKENIZER.encode("one red hen")
    free = generate(session.model, TOKENIZER, always, session.params)
    session.template = lambda tokenizer, messages: Rendered(always, (free.tokens[3],))
    with_stop = SamplingParams(temperature=0, max_new_tokens=30, stop_token_ids=(free.tokens[3],))
    assert "".join(session.answer("?")) == generate(session.model, TOKENIZER, always, with_stop).text


# --- commands ---------------------------------------------------------------------------------------------------------


def test_parameters_are_changed_on_the_fly():
    session = make_session()
    assert obey(session, "/set max_new_tokens 3") == "max_new_tokens 3"
    assert len("".join(session.answer("hen"))) == 3
    assert obey(session, "/set temperature 0.5") == "temperature 0.5"
    assert obey(session, "/set stop_token_ids 7,8") == "stop_token_ids 7,8"
    assert obey(session, "/set seed none") == "seed none"
    wanted = SamplingParams(temperature=0.5, max_new_tokens=3, stop_token_ids=(7, 8))
    assert session.params == wanted
    assert "temperature 0.5" in obey(session, "/show")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature 1", "temprature is no parameter; did you mean temperature?"),
        ("/set temperature -1", "temperature is -1"),
        ("/set temperature warm", "temperature is 'warm'; a number is expected"),
        ("/set top_k 0", "top_k: must be a whole number of at least 1, or -1"),
        ("/set n 2", "n: an answer is shown as it is made"),
        ("/set temperature", "temperature is ''"),
        ("/set", "/set NAME VALUE"),
        ("/reset now", "/reset stands alone"),
        ("/sett", "/sett is no command; did you mean set?"),
        ("/undo", "nothing was said yet"),
        ("/load nowhere.json", "nowhere.json: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(line, message):
    session = make_session(SYSTEM)
    before = session.params
    with pytest.raises(ValueError, match=re.escape(message)):
        obey(session, line)
    assert (session.params, session.messages) == (before, [SYSTEM])


def test_undo_takes_back_a_message_with_its_answer_and_reset_all_but_the_system_message():
    more = [Message("user", "two"), Message("assistant", "!")]
    session = make_session(SYSTEM, A, B, *more)
    assert obey(session, "/undo") == "taken back: two"
    assert session.messages == [SYSTEM, A, B]
    obey(session, "/reset")
    assert session.messages == [SYSTEM]


def test_a_conversation_is_saved_and_gone_on_with(tmp_path):
    file = tmp_path / "talk.json"
    session = make_session(SYSTEM, A, Message("assistant", "狗\n"))
    obey(session, f"/save {file}")
    other = make_session(A)
    obey(other, f"/load {file}")
    assert other.messages == session.messages
    obey(other, "/undo")
    obey(other, f"/save {file}")
    assert read_conversation(file) == [SYSTEM]


def test_a_file_that_is_no_conversation_is_neither_read_nor_overwritten(tmp_path):
    session = make_session(A, B)
    user = {"role": "user", "content": "a"}
    for content, message in [
        ("notes", "not valid JSON"),
        ("{}", "no conversation"),
        (json.dumps({"messages": [user, {"role": "robot", "content": ""}]}), "message 1: role system, user"),
        (json.dumps({"messages": [user, {"role": "system", "content": ""}]}), "message 1: system after user"),
    ]:
        file = tmp_path / "notes.json"
        file.write_text(content)
        for command in ("save", "load"):
            with pytest.raises(ValueError, match=message):
                obey(session, f"/{command} {file}")
        assert file.read_text() == content
        assert session.messages == [A, B]


def test_help_names_every_command():
    said = obey(make_session(), "/help")
    assert all(f"/{name}" in said for name in COMMANDS)


# --- the terminal -----------------------------------------------------------------------------------------------------


def command(*words):
    return [sys.executable, "-m", "minillm.cli", "chat", *map(str, words)]


def test_lines_are_answered_until_the_input_ends(tmp_path):
    model = make_model()
    save(model, TOKENIZER, tmp_path / "saved")
    lines = ["hen", "/set max_new_tokens 4", "", "/sett", "/save /nowhere/a.json", "red", "/exit", "never said"]
    words = [tmp_path / "saved", "--temperature", 0, "--max_new_tokens", 6, "--system", "A story.", "--dtype", "bf16"]
    done = subprocess.run(command(*words), input="\n".join(lines), capture_output=True, text=True, check=False)
    session = Session(model.bfloat16(), TOKENIZER, SamplingParams(temperature=0, max_new_tokens=6), [SYSTEM])
    answers = ["".join(session.answer("hen"))]
    obey(session, "/set max_new_tokens 4")
    answers.append("".join(session.answer("red")))
    assert done.stdout.splitlines() == answers
    changed, unknown, unsaved = done.stderr.splitlines()
    assert (changed, unknown) == ("max_new_tokens 4", "/sett is no command; did you mean set?" + ANYWAY)
    assert "/nowhere" in unsaved
    assert done.returncode == 0


ANYWAY = "; a space before the slash makes it a message"


def test_a_path_that_is_no_model_fails_in_one_line(tmp_path):
    done = subprocess.run(command(tmp_path), input="", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_options_that_choose_among_answers_are_refused(capsys):
    assert run_command(cli.dispatch, ["chat", "anything", "--n", "2"]) == 1
    assert "n: an answer is shown as it is made" in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_chat(tmp_path):
    save(make_model(max_seq_len=100_000), TOKENIZER, tmp_path / "saved")
    words = command(tmp_path / "saved", "--temperature", 0, "--max_new_tokens", 90_000)
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background of a shell
        os.execv(words[0], words)

    said = ""

    def press(keys, pattern):
        """Writes keys and reads until the pattern comes; keys that come between two looks at the terminal, again."""
        nonlocal said
        os.write(terminal, keys)
        end = time.monotonic() + 60
        while not (found := re.search(pattern, said)):
            assert time.monotonic() < end, f"{pattern} in {said[-200:]!r}"
            if select.select([terminal], [], [], 2)[0]:
                said += os.read(terminal, 4096).decode()
            elif keys == CTRL_C:
                os.write(terminal, keys)
        said = said[found.end() :]

    try:
        press(b"", "> ")
        press(b"red hen\n", "[a-h]{20}")  # it has begun, long before its end
        press(CTRL_C, "stopped(?s:.)*> ")
        press(CTRL_C, "Ctrl-D or /exit ends the chat(?s:.)*> ")
        press(b"/undo\n", "taken back: red hen(?s:.)*> ")
        os.write(terminal, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    finally:
        os.close(terminal)  # which hangs up on a chat that is still there
