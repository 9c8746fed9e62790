"""The formats in which families of models are given a conversation, as data.

A template is a text for each role, in which {content} stands for what was said, {bos} and {eos} for the tokenizer's
tokens, and the names of special tokens for themselves. An answer has three parts:

    <|im_start|>assistant\\n | {content}<|im_end|> | \\n
    opening: a prompt ends    answer: is learned    closing
    with it
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Role = Literal["tools", "system", "user", "assistant", "tool"]  # tools: those that there are; it comes first
# Who may speak after whom; None is the beginning.
FOLLOWS = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


class Message(NamedTuple):
    """What one side said."""

    role: Role
    content: str  # of tools: one as JSON on each line
    calls: tuple[str, ...] = ()  # of tools by the assistant: {"name": ..., "arguments": {...}} each


@dataclass(frozen=True)
class ChatTemplate:
    """How a family of models is given a conversation."""

    name: str
    user: str
    opening: str  # of an answer
    answer: str
    closing: str = ""
    begin: str = ""
    system: str | None = None  # None: there is no place for such a message
    system_in_user: bool = False  # what is made of the system message stands where the first user's content begins
    default_system: str | None = None  # where a conversation has none
    tool: str | None = None
    tools_begin: str = ""  # around messages of tools that follow one another
    tools_end: str = ""
    call: str | None = None  # of a tool, on a line of its own in an answer; None: there is no format for it
    about_tools: str | None = None  # what the system's message ends with where there are tools
    marks: tuple[str, ...] = ()  # special tokens that the tokenizer has to have
    strips: bool = False  # white space around what was said is left out


CHATML = ChatTemplate(
    "chatml",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    opening="<|im_start|>assistant\n",
    answer="{content}<|im_end|>",
    closing="\n",
    tool="<|im_start|>tool\n{content}<|im_end|>\n",
    call="{content}",
    marks=("<|im_start|>", "<|im_end|>"),
)

# The formats are those of the models' own cards and tokenizer_config.json: Qwen2.5, Llama 2 Chat, Meta Llama 3, Zephyr,
# Gemma 1 and 2, Mistral 7B Instruct v0.2; Stanford Alpaca's README; Vicuna 1.1 in FastChat.
FAMILIES = (
    CHATML,
    replace(
        CHATML,
        name="qwen",
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        tools_begin="<|im_start|>user",
        tool="\n<tool_response>\n{content}\n</tool_response>",
        tools_end="<|im_end|>\n",
        call="<tool_call>\n{content}\n</tool_call>",
        about_tools=(
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
            "function signatures within <tools></tools> XML tags:\n<tools>\n{content}\n</tools>\n\nFor each function "
            "call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
            '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        ),
    ),
    ChatTemplate(
        "llama-2",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        system_in_user=True,
        user="{bos}[INST] {content} [/INST]",
        opening="",
        answer=" {content} {eos}",
        strips=True,
    ),
    ChatTemplate(
        "llama-3",
        begin="<|begin_of_text|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{content}<|eot_id|>",
        tool="<|start_header_id|>tool<|end_header_id|>\n\n{content}<|eot_id|>",
        marks=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strips=True,
    ),
    ChatTemplate(
        "alpaca",
        begin="{bos}",
        default_system=(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        ),
        system="{content}\n\n",
        user="### Instruction:\n{content}\n\n",
        opening="### Response:\n",
        answer="{content}{eos}",
        closing="\n\n",
    ),
    ChatTemplate(
        "vicuna",
        begin="{bos}",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions."
        ),
        system="{content} ",
        user="USER: {content} ",
        opening="ASSISTANT:",
        answer=" {content}{eos}",
    ),
    ChatTemplate(
        "zephyr",
        system="<|system|>\n{content}{eos}\n",
        user="<|user|>\n{content}{eos}\n",
        opening="<|assistant|>\n",
        answer="{content}{eos}",
        closing="\n",
    ),
    ChatTemplate(
        "gemma",
        begin="{bos}",
        user="<start_of_turn>user\n{content}<end_of_turn>\n",
        opening="<start_of_turn>model\n",
        answer="{content}<end_of_turn>",
        closing="\n",
        marks=("<start_of_turn>", "<end_of_turn>"),
        strips=True,
    ),
    ChatTemplate(
        "mistral",
        begin="{bos}",
        user="[INST] {content} [/INST]",
        opening="",
        answer="{content}{eos}",
    ),
    ChatTemplate(
        "plain",
        begin="{bos}",
        system="{content}\n",
        user="{content}\n",
        opening="",
        answer="{content}{eos}",
        tool="{content}\n",
        call="{content}",
    ),
)
TEMPLATES = {template.name: template for template in FAMILIES}
