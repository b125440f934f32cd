"""Fixed prompts, for models without a chat template and for the runs of the NEFTune paper.

alpaca: Stanford Alpaca's, one instruction and one answer.
vicuna: Vicuna v1.1's, as FastChat trains it: one sentence, then exchanges, an end-of-sequence token
    after every answer.
llama2: Llama-2-chat's, as Meta's reference code builds it: every exchange is tokenised separately
    between a beginning-of-sequence and an end-of-sequence token, contents are stripped, and no part
    of them is read as a special token.

Every prompt exists also as a Jinja program, for users of the trained model.
"""

from __future__ import annotations

import json
from itertools import zip_longest

from neftune_dist.data.conversation import Conversation
from neftune_dist.data.errors import BadRow
from neftune_dist.data.spans import FRAME, Chunk, Rendered, Span

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n"
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_LLAMA2_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

NAMES = {"alpaca": "Alpaca", "vicuna": "Vicuna", "llama2": "Llama-2"}
_Part = tuple[str, str]  # speaker and text

# `as_jinja` puts assignments before these programs: `begin` (before the first exchange), `again`
# (before every other), `end` (after an answer), `system` (or none) and the sentences above.
_LIFT_SYSTEM = """
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}
{%- set messages = messages[1:] %}
{%- endif %}"""
_ALTERNATE = """
{%- for message in messages %}
{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}
{{- raise_exception('This prompt takes questions and answers by turns.') }}
{%- endif %}"""
_JINJA = {
    # An Alpaca row's input may be given as the key `input` of the message.
    "alpaca": r"""
{%- if messages | map(attribute='role') | list not in (['user'], ['user', 'assistant']) %}
{{- raise_exception('The Alpaca prompt takes one instruction and one answer.') }}
{%- endif %}
{%- if messages[0]['input'] %}
{{- begin + with_input + messages[0]['content'] + '\n\n### Input:\n' + messages[0]['input'] }}
{%- else %}
{{- begin + without_input + messages[0]['content'] }}
{%- endif %}
{{- '\n\n### Response:' }}
{%- if messages | length == 2 %}
{{- messages[1]['content'] + end }}
{%- endif %}""",
    "vicuna": _LIFT_SYSTEM
    + _ALTERNATE
    + r"""
{%- if message['role'] == 'assistant' %}
{{- ' ASSISTANT: ' + message['content'] + end }}
{%- else %}
{{- (begin + (usual if system is none else system) + ' ' if loop.first else again) + 'USER: ' }}
{{- message['content'] }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- ' ASSISTANT:' }}
{%- endif %}""",
    "llama2": _LIFT_SYSTEM
    + _ALTERNATE
    + r"""
{%- if message['role'] == 'assistant' %}
{{- ' ' + message['content'].strip() + ' ' + end }}
{%- elif loop.first and system is not none %}
{%- set asked = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}
{{- begin + '[INST] ' + asked.rstrip() + ' [/INST]' }}
{%- else %}
{{- (begin if loop.first else again) + '[INST] ' + message['content'].strip() + ' [/INST]' }}
{%- endif %}
{%- endfor %}""",
}


def render(template: str, conversation: Conversation, last_only: bool) -> Rendered:
    """Render a conversation in a fixed prompt.

    Args:
        template: the prompt's name.
        conversation: with at least one answer.
        last_only: of the answers to learn, only the last is learned.

    Raises:
        BadRow: the prompt cannot express the turns.
    """
    if conversation.tools or any(turn.tool_calls for turn in conversation.turns):
        raise BadRow(f"the {NAMES[template]} prompt has no place for tools and their calls")
    if any(turn.reasoning for turn in conversation.turns):
        raise BadRow(
            f"the {NAMES[template]} prompt has no place for reasoning: put it into the content, "
            "or take a chat template that writes it"
        )
    exchanges = {"alpaca": _alpaca, "vicuna": _vicuna, "llama2": _llama2}[template](conversation)
    answers = [turn for turn in conversation.turns if turn.role == "assistant"]
    learned = [i for i, turn in enumerate(answers) if turn.learned]
    if last_only:
        learned = learned[-1:]
    alone = template == "llama2"
    chunks = [
        _chunk(parts, learned=i in learned, starts=i == 0 or alone, literal=alone)
        for i, parts in enumerate(exchanges)
    ]
    return Rendered(tuple(chunks))


def as_jinja(template: str, prefix: str, end: str, gap: str, system: str | None) -> str:
    """The prompt as a Jinja program for `apply_chat_template`.

    Args:
        template: the prompt's name.
        prefix: the special tokens that the tokenizer puts before a text.
        end: the end-of-sequence token.
        gap: text after a special token that makes the following text the tokens of that text alone.
        system: the system prompt of conversations without one.
    """
    begin = prefix + gap if prefix else ""
    values = {
        "begin": begin,
        "again": begin or gap if template == "llama2" else gap,
        "end": end,
        "system": system,
        "usual": _VICUNA_SYSTEM,
        "with_input": _ALPACA_WITH_INPUT,
        "without_input": _ALPACA_WITHOUT_INPUT,
    }
    program = _JINJA[template]
    used = [f"{{%- set {name} = {quoted(v)} %}}" for name, v in values.items() if name in program]
    return "\n".join(used) + program


def quoted(text: str | None) -> str:
    """A text, or none, as a Jinja literal."""
    return "none" if text is None else json.dumps(text, ensure_ascii=False)


def _chunk(parts: list[_Part], *, learned: bool, starts: bool, literal: bool) -> Chunk:
    """The text of an exchange, which ends with its answer, if it has one."""
    text, spans = "", []
    for speaker, said in parts:
        if speaker != FRAME:
            is_learned = learned and speaker == "assistant"
            spans.append(Span(len(text), len(text) + len(said), speaker, is_learned))
        text += said
    cuts = tuple(span.begin for span in spans if span.learned)
    return Chunk(text, tuple(spans), starts, parts[-1][0] == "assistant", literal, cuts)


def _alpaca(conversation: Conversation) -> list[list[_Part]]:
    roles = [turn.role for turn in conversation.turns]
    if roles != ["user", "assistant"]:
        raise BadRow(
            "the Alpaca prompt takes one instruction and one answer, not the turns "
            f"{', '.join(roles[:4])}{', ...' if len(roles) > 4 else ''}"
        )
    asked, said = (turn.content for turn in conversation.turns)
    parts = [(FRAME, _ALPACA_WITHOUT_INPUT), ("user", asked)]
    if conversation.context:
        parts = [(FRAME, _ALPACA_WITH_INPUT), ("user", asked)]
        parts += [(FRAME, "\n\n### Input:\n"), ("user", conversation.context)]
    return [[*parts, (FRAME, "\n\n### Response:"), ("assistant", said)]]


def _vicuna(conversation: Conversation) -> list[list[_Part]]:
    system, pairs = _exchanges("vicuna", conversation)
    sentence = (FRAME, _VICUNA_SYSTEM) if system is None else ("system", system)
    exchanges = []
    for i, (question, answer) in enumerate(pairs):
        parts = [sentence, (FRAME, " USER: ")] if i == 0 else [(FRAME, "USER: ")]
        parts.append(("user", question))
        if answer is not None:
            parts += [(FRAME, " ASSISTANT:"), ("assistant", f" {answer}")]
        exchanges.append(parts)
    return exchanges


def _llama2(conversation: Conversation) -> list[list[_Part]]:
    for number, turn in enumerate(conversation.turns, 1):
        for mark in _LLAMA2_MARKS:
            if mark in turn.content:
                raise BadRow(f"turn {number} holds {mark}, a mark of the Llama-2 prompt itself")
    system, pairs = _exchanges("llama2", conversation)
    exchanges = []
    for i, (question, answer) in enumerate(pairs):
        parts = [(FRAME, "[INST] ")]
        if i == 0 and system is not None:
            # Meta strips the system prompt and the question as one text.
            question = question.rstrip()
            closing = "\n<</SYS>>\n\n" if question else "\n<</SYS>>"
            parts += [(FRAME, "<<SYS>>\n"), ("system", system), (FRAME, closing)]
        parts += [("user", question if len(parts) > 1 else question.strip()), (FRAME, " [/INST]")]
        if answer is not None:
            parts.append(("assistant", f" {answer.strip()} "))
        exchanges.append(parts)
    return exchanges


def _exchanges(
    template: str, conversation: Conversation
) -> tuple[str | None, list[tuple[str, str | None]]]:
    """The system prompt, or None, and pairs of question and answer; the last question may have
    no answer."""
    messages = conversation.messages()
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    first = 0 if system is None else 1
    for i, message in enumerate(messages[first:]):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise BadRow(
                f"the {NAMES[template]} prompt takes questions and answers by turns, with one "
                f"system prompt at most, in front: turn {first + i + 1} is of the role "
                f"{message['role']}, not {expected}"
            )
    contents = [message["content"] for message in messages[first:]]
    return system, list(zip_longest(contents[::2], contents[1::2]))
