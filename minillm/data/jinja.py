"""Chat templates in Jinja, which Hugging Face's tools read: written from ours, known ones recognised by their text.

Jinja is a programming language, so a text that came with a model is only compared, never run.
"""

import hashlib
from typing import NamedTuple

from minillm.data.chat import CONTENT, find_template, missing_marks, parts_of, stop_ids
from minillm.data.chat_templates import TEMPLATES, ChatTemplate
from minillm.tokenizer import Tokenizer

# Published texts by the sha256 of what `comparable` leaves of them.
PUBLISHED = {
    "153280e3ff55d19da1398bdb3914ee2a51b80429bfaedde11d7d216c39db80f3": "chatml",
    "a18cc698dd45623eb707279d08e66f7bb8d76afc89ead84016b88487b395b5cc": "qwen",
    "9780fae5bfea3cfd7be37d328c6edfd296a8869be8131495bbe7eb37e780c88c": "llama-2",
    "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122": "llama-3",
    "66291cf0045c2425a3a667cf3cbb7af2b11f09e025c02f97245323ab79119362": "zephyr",
    "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6": "gemma",
    "3919b9309d8949ee8f4b710215987700f87dc5bb0e87bf24dd39189ec65e3eec": "gemma",
    "26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7": "mistral",
}
SAID = "message['content']"
# Each call of a tool in an answer, on a line of its own; its arguments may be JSON already.
CALLS = (
    "{%- for call in message['tool_calls'] or [] %}{%- set call = call.function or call %}"
    "{%- if message['content'] or not loop.first %}{{- '\\n' }}{%- endif %}"
)
CALL = (
    """'{"name": ' + call.name | tojson + ', "arguments": ' + """
    "(call.arguments if call.arguments is string else call.arguments | tojson) + '}'"
)
DEFAULT = "chatml"  # for a model that was taught none, where its tokenizer has the tokens


def jinja(template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """What goes into chat_template of a tokenizer_config.json: renders what `render` and `prompt` do."""
    names = {id: name for name, id in tokenizer.special_tokens.items()}

    def term(text: str, content: str) -> str:
        parts = [names.get(part, part) if part is not CONTENT else part for part in parts_of(text, tokenizer)]
        return " + ".join(content if part is CONTENT else quoted(part) for part in parts)

    def write(text: str, content: str = "") -> str:
        return "{{- " + term(text, content) + " }}" if text else ""

    said = SAID + " | trim" * template.strips
    told = said  # by the system
    lines = [write(template.begin)]
    if template.about_tools is not None:
        about_tools = term(template.about_tools, "(tools | map('tojson') | join('\\n'))")
        lines.append(
            "{%- set about_tools = '' %}{%- if tools %}{%- set about_tools = " + about_tools + " %}{%- endif %}"
        )
        told += " + about_tools"
    if template.system_in_user:
        system = term(template.system, "messages[0]['content']")
        lines.append("{%- set system = '' %}")
        lines.append("{%- if messages[0]['role'] == 'system' %}{%- set system = " + system + " %}{%- endif %}")
        said = "((system if loop.index0 == 1 else '') + message['content'])" + " | trim" * template.strips
    if template.default_system is not None:
        default = write(template.system, told.replace(SAID, quoted(template.default_system)))
        lines.append("{%- if messages[0]['role'] != 'system' %}" + default + "{%- endif %}")
    lines.append("{%- for message in messages %}")
    lines.append("{%- if message['role'] == 'user' %}" + write(template.user, said))
    lines.append("{%- elif message['role'] == 'assistant' %}")
    if template.call is None:
        answer = write(template.answer, said)
    else:
        before, _, after = template.answer.partition("{content}")
        answer = write(before + "{content}", f"({said} or '')") + CALLS + write(template.call, CALL) + "{%- endfor %}"
        answer += write(after)
    lines[-1] += write(template.opening) + answer + write(template.closing)
    if template.system is not None:
        written = "" if template.system_in_user else write(template.system, told)
        lines.append("{%- elif message['role'] == 'system' and loop.first %}" + written)
    if template.tool is not None:
        begins = "{%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}"
        ends = "{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}"
        begins = begins + write(template.tools_begin) + "{%- endif %}" if template.tools_begin else ""
        ends = ends + write(template.tools_end) + "{%- endif %}" if template.tools_end else ""
        lines.append("{%- elif message['role'] == 'tool' %}" + begins + write(template.tool, said) + ends)
    refusal = f"the template {template.name} has no place for a "
    lines.append("{%- else %}{{- raise_exception(" + quoted(refusal) + " + message['role'] + ' message here') }}")
    lines += ["{%- endif %}", "{%- endfor %}"]
    if template.opening:
        lines.append("{%- if add_generation_prompt %}" + write(template.opening) + "{%- endif %}")
    return "\n".join(filter(None, lines))


def quoted(text: str) -> str:
    """A text as Jinja spells it."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def recognise(text: str, tokenizer: Tokenizer) -> str | None:
    """The name of the template that a Jinja text is; None for one that is not known."""
    text = comparable(text)
    for name, template in TEMPLATES.items():
        if not missing_marks(template, tokenizer) and comparable(jinja(template, tokenizer)) == text:
            return name
    return PUBLISHED.get(hashlib.sha256(text.encode()).hexdigest())


def comparable(text: str) -> str:
    """A text without white space around it, its line breaks written in one of the two ways there are."""
    return text.strip().replace("\\n", "\n")


def jinja_of(tokenizer: Tokenizer) -> str | None:
    """The chat template that came with a tokenizer of Hugging Face's; of several the default."""
    found = getattr(tokenizer, "config", {}).get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found


class Exported(NamedTuple):
    """What Hugging Face's tools have to know of a chat template."""

    jinja: str
    stop_ids: tuple[int, ...]


def exported(name: str | None, tokenizer: Tokenizer | None) -> Exported | None:
    """The template of that name for Hugging Face's tools: as it came with the tokenizer, where it did, else as ours."""
    if name is None or tokenizer is None:
        return None
    template, theirs = find_template(name, tokenizer), jinja_of(tokenizer)
    if theirs is None or recognise(theirs, tokenizer) != name:
        theirs = jinja(template, tokenizer)
    return Exported(theirs, stop_ids(template, tokenizer))


def choose_template(wanted: str, tokenizer: Tokenizer, taught: str | None = None) -> ChatTemplate:
    """The template of `sft.template`; for auto the one that the model was taught, or that its tokenizer came with.

    Raises ValueError where that is not known, and where another is wanted than the model was `taught`.
    """
    theirs = jinja_of(tokenizer)
    known = taught or (recognise(theirs, tokenizer) if theirs else None)
    if wanted != "auto":
        template = find_template(wanted, tokenizer)
        if taught not in (None, wanted):
            raise ValueError(f"template: {wanted} is given, but the model was taught {taught}; leave it out")
        return template
    if known is None and theirs:
        raise ValueError(
            "template: the chat template that came with the tokenizer is none that is known; name the nearest of "
            f"{', '.join(name for name in TEMPLATES if not missing_marks(TEMPLATES[name], tokenizer))}"
        )
    return find_template(known or DEFAULT, tokenizer)
