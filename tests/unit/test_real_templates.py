"""The chat templates of today's families, as TRL ships them, against transformers' rendering."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.errors import BadRow
from neftune_dist.data.spans import Chunk, Rendered
from neftune_dist.data.tokenize import Document
from tests.support.documents import decode, learned, make

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
TAG = re.compile(r"<[^<>\s{}'\"]+>")
# What marks may hold of a generation prompt.
PROMPT_END = re.compile(r"\s*(<[^<>]*>)?(assistant)?\s*(<think>\s*(</think>\s*)?)?")
# Those that take contents as lists of parts alone.
OF_PARTS = ("idefics3", "llava_next", "smolvlm")
# Kinds of `KINDS` for which a template has no place.
NO_THOUGHTS, NO_CALLS = {"reasoning"}, {"calls"}
PLAIN = NO_THOUGHTS | NO_CALLS
REFUSED = {
    "gemma": PLAIN | {"system"},
    "deepseek_r1_distill_training": PLAIN,
    **dict.fromkeys(("cohere", "cohere2", "gemma3", "idefics3", "lfm2", "llama3"), PLAIN),
    **dict.fromkeys(("llava_next", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"), PLAIN),
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), NO_CALLS),
    **dict.fromkeys(("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "lfm2_v2"), NO_THOUGHTS),
    **dict.fromkeys(("llama3_1", "llama3_2", "qwen2_5", "qwen3_vl"), NO_THOUGHTS),
    "qwen3_instruct_2507": NO_THOUGHTS,
}
# Ways in which templates ask for the answer without reasoning.
SWITCHES: tuple[dict[str, bool], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})

CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "tree"}}}
PROPERTIES = {"word": {"type": "string", "description": "To look up."}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": PROPERTIES, "required": ["word"]},
    },
}
ASKED = (Turn("user", "What is a tree?"), Turn("assistant", "A plant."))
TALK = (*ASKED, Turn("user", "  And a\n\nbush? "), Turn("assistant", "A smaller one, too."))
PENSIVE = tuple(
    turn._replace(reasoning=f"Thought {i}.") if turn.role == "assistant" else turn
    for i, turn in enumerate(TALK)
)
CALLING = (
    ASKED[0],
    Turn("assistant", "", json.dumps([CALL])),
    Turn("tool", '{"found": "a plant"}'),
    Turn("assistant", "A plant."),
)
KINDS = {
    "talk": Conversation(TALK),
    "system": Conversation((Turn("system", "Be brief."), *TALK)),
    "reasoning": Conversation(PENSIVE),
    "calls": Conversation(CALLING, tools=json.dumps([TOOL])),
}


def source(name: str) -> str:
    """The template with the fixed date, where transformers would take the clock's."""
    text = (FOLDER / f"{name}.jinja").read_text()
    for code, date in (("%Y-%m-%d", "2024-07-26"), ("%d %b %Y", "26 Jul 2024")):
        for quote in "'\"":
            text = text.replace(f"strftime_now({quote}{code}{quote})", f'"{date}"')
    return text


def messages_of(spoken: Conversation, name: str) -> list[dict[str, Any]]:
    """In OpenAI's form, with reasoning under the name that transformers maps to all others."""
    messages = spoken.messages()
    for turn, message in zip(spoken.turns, messages, strict=True):
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if name.startswith(OF_PARTS):
            message["content"] = [{"type": "text", "text": message["content"]}]
    return messages


@pytest.fixture(scope="module")
def tagged(tiny_tokenizer: Any) -> Any:
    """A tokenizer to which all tags of all templates are tokens."""
    tags = {tag for name in NAMES for tag in TAG.findall(source(name))}
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in sorted(tags)])
    return tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_text_and_mask_are_those_of_transformers(name: str, tagged: Any) -> None:
    tagged.chat_template = (FOLDER / f"{name}.jinja").read_text()
    template, refused = make(tagged), set()
    tagged.chat_template = source(name)
    for kind, spoken in KINDS.items():
        try:
            documents = template.documents(spoken)
        except BadRow:
            refused.add(kind)
            continue
        taught = []
        for part, rendered in documents:
            [made] = template.encode([rendered])
            assert made.end_learned or name.startswith("glm4moe")  # which writes no end
            taught += check(name, part, rendered, made, tagged)
        answers = [i for i, turn in enumerate(spoken.turns) if turn.role == "assistant"]
        assert sorted(taught) == answers
    usual = REFUSED.get(name.removesuffix("_training"), set())
    assert refused == REFUSED.get(name, usual)


def check(
    name: str, part: Conversation, rendered: Rendered, made: Document, tokenizer: Any
) -> list[int]:
    """Compare a document with what transformers makes of its conversation; the turns it teaches."""
    tools = json.loads(part.tools) if part.tools else None
    messages, said = messages_of(part, name), []

    def apply(number: int, **switches: bool) -> str:
        made = tokenizer.apply_chat_template(
            messages[:number], tools=tools, tokenize=False, **switches
        )
        return str(made)

    expected, text = [], apply(len(messages))
    for i, turn in enumerate(part.turns):
        if turn.role == "assistant" and turn.learned:
            said.append(i)
            through = apply(i + 1)
            prompts = [apply(i, add_generation_prompt=True, **switch) for switch in SWITCHES]
            prompts = [prompt for prompt in prompts if through.startswith(prompt)]
            if prompts:
                answer = through[len(max(prompts, key=len)) :].rstrip()
            else:  # DeepSeek's prompt opens a thought, which the template drops even here
                begin = through.rindex(turn.content)
                thought = f"{turn.reasoning}\n</think>\n\n" if turn.reasoning else ""
                answer = thought + through[begin:]
                text = text[:begin] + ("<think>\n" if thought else "") + answer if thought else text
            if name.startswith("phi3"):  # the end of the conversation follows that of the turn
                answer = answer.partition("<|end|>")[0] + "<|end|>"
            expected.append(answer)
    [chunk] = rendered.chunks
    assert chunk.text == text
    assert decode(tokenizer, made.input_ids) == text
    assert learned(tokenizer, made) == expected
    check_marks(name, chunk, messages, tools, tokenizer)
    return said


def check_marks(
    name: str, chunk: Chunk, messages: list[dict[str, Any]], tools: Any, tokenizer: Any
) -> None:
    """Learned spans are what the template's training variant marks as generated, where its text is
    the same; marks may begin with the end of the prompt, and end with white space."""
    training = name if name.endswith("_training") else f"{name}_training"
    if training not in NAMES:
        return
    if name.startswith("diffusion_gemma") and tools:
        return  # its prompt after a result lacks the header of the turn, which the marks leave out
    [text], [marks] = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=source(training),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    if text != chunk.text:  # the variant writes the history differently
        return
    for span in chunk.spans:
        if span.learned:
            begin, end = next((b, e) for b, e in marks if b <= span.begin < e)
            assert not chunk.text[span.end : max(end, span.end)].replace("</s>", "").strip()
            assert PROMPT_END.fullmatch(chunk.text[begin : span.begin])
