"""The chat formats of the model families: a template for each, and what it must make of a talk.

The templates are short programs of the tests' own that write each family's documented format;
`text` says that format once more, by hand, so that the templates are themselves tested.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The talk that `text` is written for.
QUESTIONS = ("What is two plus three?", "And doubled?")
ANSWERS = ("It is 5.", "Then it is 10.")
SYSTEM = "Be very brief."

_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
_LIFT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
)
_CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_CHATML_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_LLAMA3_HEAD = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
_GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ system + '\n\n' if system and loop.first }}{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_QWEN_CALLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{{ '\n<tool_call>\n' }}"
    '{{ \'{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
)
_TOOLS = (
    "{% if tools %}{{ '\n\n# Tools\n\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}"
    "{% endfor %}{{ '\n</tools>' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatFamily:
    """text: of the talk, {s} standing for the system prompt. learned: what is learned of an answer.
    end, begin: the end- and beginning-of-sequence tokens; special: others that the template writes.
    """

    template: str
    text: str
    learned: Callable[[str], str]
    end: str
    special: tuple[str, ...] = ()
    begin: str | None = None
    takes_system: bool = True

    def tokenizer(self, other: Any) -> Any:
        """A copy of the tokenizer with this family's tokens and template."""
        made = copy.deepcopy(other)
        named = {"eos_token": self.end} | ({"bos_token": self.begin} if self.begin else {})
        made.add_special_tokens({**named, "extra_special_tokens": list(self.special)})
        made.pad_token = made.eos_token
        made.chat_template = self.template
        return made


def ends(mark: str) -> Callable[[str], str]:
    return lambda answer: answer + mark


FAMILIES = {
    "llama-2-chat": ChatFamily(
        _LIFT_SYSTEM
        + _ALTERNATE
        + "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if system and loop.first %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
        "{{ m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] <<SYS>>\n{s}\n<</SYS>>\n\nWhat is two plus three? [/INST] It is 5. </s>"
        "<s>[INST] And doubled? [/INST] Then it is 10. </s>",
        lambda answer: f" {answer.strip()} </s>",
        "</s>",
        begin="<s>",
    ),
    "llama-3": ChatFamily(
        "{{ bos_token }}{% for m in messages %}"
        + _LLAMA3_HEAD
        + "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{s}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is two plus three?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nIt is 5.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd doubled?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nThen it is 10.<|eot_id|>",
        lambda answer: answer.strip() + "<|eot_id|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        begin="<|begin_of_text|>",
    ),
    "mistral-v0.1": ChatFamily(
        _ALTERNATE + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token + ' ' }}"
        "{% endif %}{% endfor %}",
        "<s>[INST] What is two plus three? [/INST]It is 5.</s> "
        "[INST] And doubled? [/INST]Then it is 10.</s> ",
        ends("</s>"),
        "</s>",
        begin="<s>",
        takes_system=False,
    ),
    "mistral-v0.3": ChatFamily(  # the system prompt stands in the last question
        _LIFT_SYSTEM
        + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if system and messages[loop.index0:] | selectattr('role', 'equalto', 'user')"
        " | list | length == 1 %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] What is two plus three?[/INST] It is 5.</s>"
        "[INST] {s}\n\nAnd doubled?[/INST] Then it is 10.</s>",
        lambda answer: f" {answer}</s>",
        "</s>",
        ("[INST]", "[/INST]"),
        begin="<s>",
    ),
    "qwen-2.5": ChatFamily(
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% else %}"
        "{% set system = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}"
        "{% endif %}<|im_start|>system\n{{ system }}"
        + _TOOLS
        + "<|im_end|>\n"
        + _QWEN_CALLS
        + "{% else %}"
        + _CHATML
        + "{% endif %}{% endfor %}"
        + _CHATML_ASK,
        "<|im_start|>system\n{s}<|im_end|>\n"
        "<|im_start|>user\nWhat is two plus three?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 5.<|im_end|>\n"
        "<|im_start|>user\nAnd doubled?<|im_end|>\n"
        "<|im_start|>assistant\nThen it is 10.<|im_end|>\n",
        ends("<|im_end|>"),
        "<|im_end|>",
        ("<|im_start|>", "<|endoftext|>"),
    ),
    "qwen-3": ChatFamily(  # reasoning, even an empty one, stands after the last question only
        "{% set last = namespace(question=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
        + _QWEN_CALLS
        + "{% elif m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
        "<|im_start|>assistant\n{% if loop.index0 > last.question and (loop.last or parts[1]) %}"
        "<think>\n{{ parts[0].split('<think>')[-1].strip('\n') if parts[1] }}\n</think>\n\n"
        "{% endif %}{{ parts[-1].lstrip('\n') }}<|im_end|>\n{% else %}"
        + _CHATML
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}",
        "<|im_start|>system\n{s}<|im_end|>\n"
        "<|im_start|>user\nWhat is two plus three?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 5.<|im_end|>\n"
        "<|im_start|>user\nAnd doubled?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nThen it is 10.<|im_end|>\n",
        ends("<|im_end|>"),
        "<|im_end|>",
        ("<|im_start|>", "<|endoftext|>"),
    ),
    "gemma-2": ChatFamily(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + _ALTERNATE + _GEMMA,
        "<bos><start_of_turn>user\nWhat is two plus three?<end_of_turn>\n"
        "<start_of_turn>model\nIt is 5.<end_of_turn>\n"
        "<start_of_turn>user\nAnd doubled?<end_of_turn>\n"
        "<start_of_turn>model\nThen it is 10.<end_of_turn>\n",
        lambda answer: answer.strip() + "<end_of_turn>",
        "<end_of_turn>",
        ("<start_of_turn>",),
        begin="<bos>",
        takes_system=False,
    ),
    "gemma-3": ChatFamily(  # the system prompt stands in the first question
        "{{ bos_token }}" + _LIFT_SYSTEM + _ALTERNATE + _GEMMA,
        "<bos><start_of_turn>user\n{s}\n\nWhat is two plus three?<end_of_turn>\n"
        "<start_of_turn>model\nIt is 5.<end_of_turn>\n"
        "<start_of_turn>user\nAnd doubled?<end_of_turn>\n"
        "<start_of_turn>model\nThen it is 10.<end_of_turn>\n",
        lambda answer: answer.strip() + "<end_of_turn>",
        "<end_of_turn>",
        ("<start_of_turn>",),
        begin="<bos>",
    ),
    "phi-3": ChatFamily(  # an end of the whole conversation as well
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|system|>\n{s}<|end|>\n<|user|>\nWhat is two plus three?<|end|>\n"
        "<|assistant|>\nIt is 5.<|end|>\n<|user|>\nAnd doubled?<|end|>\n"
        "<|assistant|>\nThen it is 10.<|end|>\n<|endoftext|>",
        ends("<|end|>"),
        "<|endoftext|>",
        ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "phi-4": ChatFamily(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        "<|im_start|>system<|im_sep|>{s}<|im_end|>"
        "<|im_start|>user<|im_sep|>What is two plus three?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>It is 5.<|im_end|>"
        "<|im_start|>user<|im_sep|>And doubled?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Then it is 10.<|im_end|>",
        ends("<|im_end|>"),
        "<|endoftext|>",
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "smollm2": ChatFamily(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "{% endif %}" + _CHATML + "{% endfor %}" + _CHATML_ASK,
        "<|im_start|>system\n{s}<|im_end|>\n"
        "<|im_start|>user\nWhat is two plus three?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 5.<|im_end|>\n"
        "<|im_start|>user\nAnd doubled?<|im_end|>\n"
        "<|im_start|>assistant\nThen it is 10.<|im_end|>\n",
        ends("<|im_end|>"),
        "<|im_end|>",
        ("<|im_start|>",),
    ),
    "zephyr": ChatFamily(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|system|>\n{s}</s>\n<|user|>\nWhat is two plus three?</s>\n"
        "<|assistant|>\nIt is 5.</s>\n<|user|>\nAnd doubled?</s>\n"
        "<|assistant|>\nThen it is 10.</s>\n",
        ends("</s>"),
        "</s>",
    ),
    "chatml": ChatFamily(
        "{% for m in messages %}" + _CHATML + "{% endfor %}" + _CHATML_ASK,
        "<|im_start|>system\n{s}<|im_end|>\n"
        "<|im_start|>user\nWhat is two plus three?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 5.<|im_end|>\n"
        "<|im_start|>user\nAnd doubled?<|im_end|>\n"
        "<|im_start|>assistant\nThen it is 10.<|im_end|>\n",
        ends("<|im_end|>"),
        "<|im_end|>",
        ("<|im_start|>",),
    ),
    "vicuna": ChatFamily(
        _LIFT_SYSTEM
        + _ALTERNATE
        + "{{ bos_token + (system or 'A chat.') + ' ' }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "<s>{s} USER: What is two plus three? ASSISTANT: It is 5.</s>"
        "USER: And doubled? ASSISTANT: Then it is 10.</s>",
        lambda answer: f" {answer}</s>",
        "</s>",
        begin="<s>",
    ),
    "tulu": ChatFamily(  # OLMo, too; no line break after the last answer
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% if not (loop.last and m.role == 'assistant') %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|endoftext|><|system|>\n{s}\n<|user|>\nWhat is two plus three?\n"
        "<|assistant|>\nIt is 5.<|endoftext|>\n<|user|>\nAnd doubled?\n"
        "<|assistant|>\nThen it is 10.<|endoftext|>",
        ends("<|endoftext|>"),
        "<|endoftext|>",
        begin="<|endoftext|>",
    ),
}
