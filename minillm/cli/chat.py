"""`minillm chat`: a conversation in the terminal.

What a line does is decided in `Session` and COMMANDS, which know no terminal; `chat` reads lines and shows what comes:
answers on standard output, all else on standard error.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from torch import nn

from minillm.cli.conversation import (
    Template,
    continuation,
    conversing,
    fitting,
    read_conversation,
    template_for,
    to_json,
)
from minillm.cli.model import params_of_folder
from minillm.cli.verb import Verb
from minillm.config import checked, fields_of, nearest, shown
from minillm.data.chat_templates import Message
from minillm.distributed.device import find_device
from minillm.files import write_atomically
from minillm.generate.generate import stream
from minillm.generate.params import SamplingParams
from minillm.load import find_checkpoint, load
from minillm.tokenizer import Tokenizer
from minillm.trainer.config import DTYPES

ANSWER_TOKENS = 256  # kept free for an answer where max_new_tokens is not set, or a quarter of a small context
SEVERAL = ("n", "best_of", "use_beam_search", "num_beams", "length_penalty", "early_stopping")  # answers compared
ONE_ANSWER = "an answer is shown as it is made, so there is one, and nothing to choose from"
PARAMETERS = {field.name: field for field in fields_of(SamplingParams)}
DEFAULTS = {name: getattr(SamplingParams(), name) for name in PARAMETERS}


@dataclass(frozen=True, kw_only=True)
class Chat(SamplingParams):
    """Options of `chat`."""

    path: Annotated[str, "run directory, checkpoint, or folder"]
    system: Annotated[str, "what stands before the conversation, however long that gets"] = ""
    template: Annotated[str, "how it is given what is said; auto: as it was taught, none: as text to continue"] = "auto"
    step: Annotated[int | None, "checkpoint of a run; none: the newest", ">= 0"] = None
    device: Annotated[str, "auto | cpu | cuda | mps | ..."] = "auto"
    dtype: Annotated[Literal["fp32", "fp16", "bf16"] | None, "of the weights (none: as they are)"] = None

    def __post_init__(self):
        super().__post_init__()
        if given := [name for name in SEVERAL if getattr(self, name) != DEFAULTS[name]]:
            raise ValueError(f"{given[0]}: {ONE_ANSWER}")


@dataclass
class Session:
    """A model, and what has been said to it."""

    model: nn.Module
    tokenizer: Tokenizer
    params: SamplingParams
    messages: list[Message] = field(default_factory=list)
    template: Template = continuation
    n_left_out: int = 0  # of the oldest messages, those that the context has no room for any more
    over: bool = False

    def room(self) -> int:
        """The most tokens that may stand before an answer."""
        context = self.model.config.max_seq_len
        return context - (self.params.max_new_tokens or min(ANSWER_TOKENS, context // 4))

    def answer(self, said: str) -> Iterator[str]:
        """The model's answer, a piece at a time, which joins the conversation as far as it is taken.

        Raises ValueError, before anything is changed, for what cannot be answered.
        """
        asked = [*self.messages, Message("user", said)]
        rendered, n_left_out = fitting(self.template, self.tokenizer, asked, self.room())
        stops = (*self.params.stop_token_ids, *rendered.stop_token_ids)
        pieces = stream(self.model, self.tokenizer, rendered.tokens, replace(self.params, stop_token_ids=stops))
        self.n_left_out = n_left_out
        return self.heard(asked, pieces)

    def heard(self, asked: list[Message], pieces: Iterator[str]) -> Iterator[str]:
        text = ""
        for piece in pieces:
            text += piece
            self.messages = [*asked, Message("assistant", text)]  # now, since an interrupt may be next
            yield piece
        self.messages = [*asked, Message("assistant", text)]


# --- commands ---------------------------------------------------------------------------------------------------------


def reset(session: Session, _: str) -> str:
    """Forget all but the system message."""
    session.messages = [message for message in session.messages if message.role == "system"]
    return "forgotten"


def undo(session: Session, _: str) -> str:
    """Take back the last message and its answer."""
    last = max((i for i, message in enumerate(session.messages) if message.role == "user"), default=None)
    if last is None:
        raise ValueError("nothing was said yet")
    taken, session.messages = session.messages[last], session.messages[:last]
    return f"taken back: {taken.content}"


def save(session: Session, path: str) -> str:
    """Write the conversation to a file; one that holds something else is left alone."""
    if Path(path).exists():
        read_conversation(path)
    write_atomically(path, to_json(session.messages))
    return f"{path}: {len(session.messages)} messages"


def load_messages(session: Session, path: str) -> str:
    """Go on from a file that was saved."""
    session.messages = read_conversation(path)
    return f"{path}: {len(session.messages)} messages"


def set_parameter(session: Session, words: str) -> str:
    """Change how answers are made."""
    name, _, value = words.partition(" ")
    if name not in PARAMETERS:
        raise ValueError(f"{name} is no parameter{nearest(name, PARAMETERS)}")
    if name in SEVERAL:
        raise ValueError(f"{name}: {ONE_ANSWER}")
    try:
        value = checked(PARAMETERS[name], value.strip())
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    session.params = replace(session.params, **{name: value})
    return f"{name} {shown(value)}"


def show(session: Session, _: str) -> str:
    """What was set, and how full the context is."""
    changed = [
        f"{name} {shown(value)}" for name in PARAMETERS if (value := getattr(session.params, name)) != DEFAULTS[name]
    ]
    n_tokens = len(session.template(session.tokenizer, session.messages).tokens)
    lines = [f"system: {message.content}" for message in session.messages if message.role == "system"]
    lines.append(f"parameters: {', '.join(changed) or 'all as they are by default'}")
    lines.append(f"conversation: {n_tokens} tokens, of which {session.room()} can stand before an answer")
    return "\n".join(lines)


def show_help(_: Session, __: str) -> str:
    """This list."""
    rows = [f"/{name} {command.argument}".rstrip().ljust(18) + command.help for name, command in COMMANDS.items()]
    return "\n".join([*rows, "Ctrl-C stops an answer, Ctrl-D ends the chat; anything else is said to the model"])


def end(session: Session, _: str) -> str:
    """End the chat."""
    session.over = True
    return ""


class Command(NamedTuple):
    """What a line that begins with a slash does."""

    run: Callable[[Session, str], str]
    help: str
    argument: str = ""


COMMANDS = {
    "set": Command(set_parameter, "change how answers are made, as in /set temperature 0.7", "NAME VALUE"),
    "show": Command(show, "what was set, and how full the context is"),
    "undo": Command(undo, "take back your last message and its answer"),
    "reset": Command(reset, "forget what was said"),
    "save": Command(save, "write the conversation to a file", "FILE"),
    "load": Command(load_messages, "go on from a file that was saved", "FILE"),
    "help": Command(show_help, "this list"),
    "exit": Command(end, "end the chat"),
}


def obey(session: Session, line: str) -> str:
    """Do what a line with a slash says, and what to tell of it. Raises ValueError where that cannot be done."""
    name, _, argument = line.removeprefix("/").partition(" ")
    if name not in COMMANDS:
        raise ValueError(f"/{name} is no command{nearest(name, COMMANDS)}; a space before the slash makes it a message")
    command, argument = COMMANDS[name], argument.strip()
    if bool(argument) != bool(command.argument):
        raise ValueError(f"/{name} {command.argument or 'stands alone'}".rstrip())
    return command.run(session, argument)


# --- the terminal -----------------------------------------------------------------------------------------------------


def chat(options: Chat) -> None:
    """Talk with a model until the input ends."""
    folder = find_checkpoint(Path(options.path), options.step)
    model, tokenizer = load(folder, find_device(options.device), dtype=DTYPES.get(options.dtype))
    if tokenizer is None:
        raise ValueError(f"{options.path}: there is no tokenizer beside the model, so it cannot read or write text")
    template = template_for(folder, options.template, tokenizer)
    params = SamplingParams(**{name: getattr(options, name) for name in PARAMETERS})
    session = Session(model, tokenizer, params, template=conversing(template))
    if options.system:
        session.messages.append(Message("system", options.system))
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        with suppress(ImportError):  # where it is there, it lets lines be edited and called back
            import readline  # noqa: F401
        does = f"answers what you say ({template.name})" if template else "continues what you write"
        say(f"{options.path}: {does}; /help lists commands")
    while not session.over:
        try:
            line = input("> " if at_terminal else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            say("\nCtrl-D or /exit ends the chat")
            continue
        try:
            if line.startswith("/"):
                say(obey(session, line))
            elif line.strip():
                show_answer(session, line)
        except (ValueError, OSError) as error:  # a file that cannot be written costs no conversation
            say(str(error))


def show_answer(session: Session, said: str) -> None:
    """Print an answer as it comes; Ctrl-C ends it, and what came of it is kept."""
    before = session.n_left_out
    try:
        pieces = session.answer(said)
        if session.n_left_out not in (0, before):
            say(f"the context is full: the {session.n_left_out} oldest messages are left out")
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        say("stopped")


def say(text: str) -> None:
    """Tell the user what is not an answer."""
    if text:
        print(text, file=sys.stderr, flush=True)


VERBS = {
    "chat": Verb(
        chat,
        Chat,
        ["path"],
        "RUN: talk with a model; one that was taught no conversations continues the text",
        defaults=params_of_folder,
    )
}
