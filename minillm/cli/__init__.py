"""`minillm VERB`: finds the verb in the tables of its modules, reads its options, and calls it."""

import itertools
import sys
from collections.abc import Sequence

from minillm.cli import chat, data, eval, machine, model, pairs, tokenizer
from minillm.config import ConfigError, Layer, arguments, build, help_text
from minillm.log import run_command
from minillm.recipe import read_layers

VERBS = tokenizer.VERBS | data.VERBS | pairs.VERBS | model.VERBS | eval.VERBS | chat.VERBS | machine.VERBS


def usage() -> str:
    """The list of verbs."""
    rows = "\n".join(f"  minillm {name} {verb.help}" for name, verb in VERBS.items())
    return f"usage: minillm VERB ...\n\n{rows}\n\n`minillm VERB --help` lists its options; --debug shows tracebacks."


def dispatch(argv: Sequence[str]) -> int:
    """Run the verb that the first one or two words name."""
    words = list(itertools.takewhile(lambda word: not word.startswith("--"), argv))
    name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in VERBS), None)
    if name is None:
        if argv and not {"-h", "--help"} & set(argv):
            raise ConfigError([f"minillm {' '.join(words[:2])}: there is no such verb\n\n{usage()}"])
        print(usage())
        return 0
    verb = VERBS[name]
    rest = list(argv)[len(name.split()) :]
    if {"-h", "--help"} & set(rest):
        print(help_text(verb.options, f"usage: minillm {name} {verb.help}"))
        return 0
    if verb.reads_config:
        verb.run(build(verb.options, read_layers(verb.options, rest)))
        return 0
    given, line = arguments(verb.options, rest)
    if len(given) > len(verb.words):
        raise ConfigError([f"minillm {name}: {given[len(verb.words)]!r} is not expected; {verb.help}"])
    layers = [Layer("command line", dict(zip(verb.words, given))), line]
    options = build(verb.options, layers)
    if verb.defaults is not None:
        options = build(verb.options, [verb.defaults(options), *layers])
    verb.run(options)
    return 0


def main() -> int:
    """The console script."""
    return run_command(dispatch, sys.argv[1:])
