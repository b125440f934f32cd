"""Every family's chat template: what is learned, decoded back, is what the assistant said."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neftune_dist.config import UserError
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.errors import BadRow
from neftune_dist.data.formats import to_conversation
from neftune_dist.data.spans import SPEAKERS
from tests.support.chat_families import ANSWERS, FAMILIES, QUESTIONS, SYSTEM, ChatFamily
from tests.support.documents import (
    ASK,
    conversation,
    decode,
    document,
    learned,
    make,
    with_template,
)

ROWS = 12
# Tokenizers, and the families whose own are of that kind.
KINDS = {
    "tiny_tokenizer": tuple(FAMILIES),
    "smollm2": ("smollm2", "chatml", "qwen-2.5", "qwen-3", "llama-3", "phi-4"),
    "llama2": ("llama-2-chat", "mistral-v0.1", "zephyr", "vicuna", "phi-3", "gemma-3"),
}
TALK = conversation(QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1])


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ChatFamily:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def talks(alpaca: Path, fastchat: Path) -> list[Conversation]:
    """Real ones: of one exchange, and of several."""
    rows = [row for row in json.loads(gzip.decompress(alpaca.read_bytes())) if row["output"]]
    single = [conversation(row["instruction"], row["output"]) for row in rows[:ROWS]]
    long = json.loads(gzip.decompress(fastchat.read_bytes()))[:ROWS]
    return single + [to_conversation(row, "sharegpt") for row in long]


def test_the_family_s_format(family: ChatFamily, tiny_tokenizer: Any) -> None:
    made = make(family.tokenizer(tiny_tokenizer))
    said = SYSTEM if family.takes_system else ""
    spoken = conversation(*(turn.content for turn in TALK.turns), system=said)
    assert made.render(spoken).text == family.text.replace("{s}", SYSTEM)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for kind, names in KINDS.items() for name in names]
)
def test_real_talks(
    name: str, kind: str, talks: list[Conversation], request: pytest.FixtureRequest
) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer(request.getfixturevalue(kind))
    template = make(tokenizer)
    for talk in talks:
        documents = template.encode([rendered for _, rendered in template.documents(talk)])
        answers = [turn.content for turn in talk.turns if turn.role == "assistant"]
        assert len(documents) == (len(answers) if name == "qwen-3" else 1)
        texts = [text for made in documents for text in learned(tokenizer, made)]
        assert texts == [family.learned(answer) for answer in answers]
        made = documents[-1]
        assert all(made.end_learned for made in documents)
        said = made.speakers == SPEAKERS.index("assistant")
        assert said[made.supervised == 1].all()
        if len(documents) == 1:
            assert np.array_equal(made.supervised == 1, said)
        if len(answers) == 1:
            prompt = template.prompt_ids(talk)
            assert made.input_ids[: len(prompt)].tolist() == prompt
            assert np.flatnonzero(made.supervised)[0] == len(prompt)


def test_a_system_prompt(family: ChatFamily, tiny_tokenizer: Any) -> None:
    tokenizer = family.tokenizer(tiny_tokenizer)
    if not family.takes_system:
        with pytest.raises(UserError, match=r"data\.system_prompt.*takes no system prompt"):
            make(tokenizer, system_prompt=SYSTEM)
        with pytest.raises(BadRow, match="the chat template refuses the turns"):
            make(tokenizer).render(conversation("a", "b", system=SYSTEM))
        return
    template = make(tokenizer, system_prompt=SYSTEM)
    made = document(template, TALK)
    assert template.render(TALK).text == family.text.replace("{s}", SYSTEM)
    parts = template.encode([rendered for _, rendered in template.documents(TALK)])
    texts = [text for part in parts for text in learned(tokenizer, part)]
    assert texts == [family.learned(answer) for answer in ANSWERS]
    system = made.input_ids[made.speakers == SPEAKERS.index("system")]
    assert decode(tokenizer, system).strip() == SYSTEM
    own = conversation(*(turn.content for turn in TALK.turns), system="Of my own.")
    assert SYSTEM not in template.render(own).text


def test_the_last_answer_alone(family: ChatFamily, tiny_tokenizer: Any) -> None:
    tokenizer = family.tokenizer(tiny_tokenizer)
    made = document(make(tokenizer, supervise="last"), TALK)
    assert learned(tokenizer, made) == [family.learned(ANSWERS[-1])]
    first = decode(tokenizer, made.input_ids[made.speakers == SPEAKERS.index("assistant")])
    assert ANSWERS[0] in first
    everything = document(make(tokenizer, supervise="all"), TALK)
    assert everything.input_ids.tolist() == made.input_ids.tolist()
    assert everything.supervised[1:].all() and everything.end_learned


# Templates that write a turn otherwise once others follow.

MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ eos_token }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THOUGHT = "<think>\nHm.\n</think>\n\n"
PENSIVE = conversation("a", THOUGHT + "one", "b", THOUGHT + "two")


def pieces(tokenizer: Any, spoken: Conversation, **data: Any) -> list[tuple[str, list[str]]]:
    """Of the documents of a conversation: the whole text, and what is learned."""
    template = make(tokenizer, **data)
    made = template.encode([rendered for _, rendered in template.documents(spoken)])
    return [
        (decode(tokenizer, document.input_ids), learned(tokenizer, document)) for document in made
    ]


def test_reasoning_that_the_history_drops_is_learned_in_a_document_that_ends_with_it(
    tiny_tokenizer: Any,
) -> None:
    tokenizer = FAMILIES["qwen-3"].tokenizer(tiny_tokenizer)
    head = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    (first, learned_first), (second, learned_second) = pieces(tokenizer, PENSIVE)
    assert learned_first == [THOUGHT + "one<|im_end|>"]
    assert first == head + THOUGHT + "one<|im_end|>\n"
    assert learned_second == [THOUGHT + "two<|im_end|>"]
    assert second == (
        head + "one<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
        f"{THOUGHT}two<|im_end|>\n"
    )
    assert pieces(tokenizer, PENSIVE, supervise="last") == [(second, learned_second)]
    with pytest.raises(BadRow, match=r"turn 2 differently.*data\.supervise=last"):
        make(tokenizer, split_conversations="never").render(PENSIVE)
    with pytest.raises(BadRow, match=r"reasoning of turn 2.*data\.supervise=assistant"):
        make(tokenizer, supervise="all").render(PENSIVE)


def test_documents_of_a_row_say_what_they_learn_and_share_its_opening(tiny_tokenizer: Any) -> None:
    tokenizer = FAMILIES["qwen-3"].tokenizer(tiny_tokenizer)
    row = replace(PENSIVE, num_left_out=2)
    parts = [part for part, _ in make(tokenizer, system_prompt=SYSTEM).documents(row)]
    assert [len(part.turns) for part in parts] == [2, 4]
    assert [[turn.learned for turn in part.turns[1::2]] for part in parts] == [
        [True],
        [False, True],
    ]
    assert [part.opening() for part in parts] == [row.opening()] * 2
    assert sum(part.num_left_out for part in parts) == 2


def test_reasoning_is_generated_where_the_answer_has_some(tiny_tokenizer: Any) -> None:
    tokenizer = FAMILIES["qwen-3"].tokenizer(tiny_tokenizer)
    template = make(tokenizer)
    for answer, prompt_end in (
        (THOUGHT + "5", "assistant\n"),
        ("5", "assistant\n<think>\n\n</think>\n\n"),
    ):
        spoken = conversation("2 + 3?", answer)
        made = document(template, spoken)
        assert learned(tokenizer, made) == [answer + "<|im_end|>"]
        prompt = template.prompt_ids(spoken)
        assert tokenizer.decode(prompt).endswith(prompt_end)
        assert made.input_ids[: len(prompt)].tolist() == prompt
    # Written with other white space than the template's, it is still the same reasoning.
    loose = document(template, conversation("2 + 3?", "<think>Hm.</think>5"))
    assert learned(tokenizer, loose) == [THOUGHT + "5<|im_end|>"]


def test_thoughts_that_any_history_drops(tiny_tokenizer: Any) -> None:
    """Whatever the template itself marks as generated."""
    tokenizer = with_template(tiny_tokenizer, MARKED)
    expected = [[THOUGHT + "one</s>"], [THOUGHT + "two</s>"]]
    assert [said for _, said in pieces(tokenizer, PENSIVE)] == expected


def test_an_answer_given_twice(tiny_tokenizer: Any) -> None:
    """Each follows its own question; where the system prompt moves to the last one, in a document
    that ends with it."""
    spoken = conversation("a", "OK", "a", "OK", "OK", "OK", system="s")
    tokenizer = FAMILIES["mistral-v0.3"].tokenizer(tiny_tokenizer)
    made = pieces(tokenizer, spoken)
    assert [said for _, said in made] == [[" OK</s>"]] * 3
    assert [text.count(" OK</s>") for text, _ in made] == [1, 2, 3]
    assert [text.count("s\n\n") for text, _ in made] == [1, 1, 1]
    without = conversation("a", "OK", "a", "OK", "OK", "OK")
    assert [said for _, said in pieces(tokenizer, without)] == [[" OK</s>"] * 3]


# Turns that do not reach the text.


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_a_template_that_drops_turns_is_found_out(role: str, tiny_tokenizer: Any) -> None:
    dropping = (
        f"{{% for m in messages if m.role != '{role}' %}}<{{{{ m.role }}}}>{{{{ m.content }}}}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    spoken = Conversation(
        (
            Turn("system", "Be brief, please."),
            Turn("user", "What is it?"),
            Turn("tool", "A lookup's result."),
            Turn("assistant", "A tree."),
        )
    )
    number = [turn.role for turn in spoken.turns].index(role) + 1
    for supervise in ("all", "assistant"):
        template = make(with_template(tiny_tokenizer, dropping), supervise=supervise)
        with pytest.raises(BadRow, match=rf"turn {number}\b"):
            template.render(spoken)


# Tools.

CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "tree"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
CALLING = Conversation(
    (
        Turn("user", "What is a tree?"),
        Turn("assistant", "", json.dumps([CALL])),
        Turn("tool", '{"found": "a plant"}'),
        Turn("assistant", "A plant."),
    ),
    tools=json.dumps([TOOL]),
)


def test_calls_are_learned_and_results_are_not(tiny_tokenizer: Any) -> None:
    tokenizer = FAMILIES["qwen-2.5"].tokenizer(tiny_tokenizer)
    made = document(make(tokenizer), CALLING)
    call = '\n<tool_call>\n{"name": "look_up", "arguments": {"word": "tree"}}\n</tool_call>'
    assert learned(tokenizer, made) == [call[1:] + "<|im_end|>", "A plant.<|im_end|>"]
    assert made.end_learned
    result = made.input_ids[made.speakers == SPEAKERS.index("tool")]
    assert decode(tokenizer, result).strip() == '{"found": "a plant"}'
    prompt = make(tokenizer).prompt_ids(CALLING)
    assert made.input_ids[: len(prompt)].tolist() == prompt
    assert '"parameters"' in decode(tokenizer, np.array(prompt))


def test_real_calls(toolcalls: Path, tiny_tokenizer: Any) -> None:
    tokenizer = FAMILIES["qwen-2.5"].tokenizer(tiny_tokenizer)
    template = make(tokenizer)
    for row in json.loads(gzip.decompress(toolcalls.read_bytes()))[:40]:
        made = document(template, to_conversation(row, "sharegpt"))
        texts = learned(tokenizer, made)
        said = [t["value"] for t in row["conversations"] if t["from"] in ("gpt", "function_call")]
        for text, value in zip(texts, said, strict=True):
            if text.startswith("<tool_call>"):
                text = text.removeprefix("<tool_call>").removesuffix("</tool_call><|im_end|>")
                assert json.loads(text) == json.loads(value)
            else:
                assert text == value + "<|im_end|>"


def test_tools_that_the_template_cannot_express(tiny_tokenizer: Any) -> None:
    tokenizer = FAMILIES["chatml"].tokenizer(tiny_tokenizer)
    calls_alone = FAMILIES["qwen-3"].tokenizer(tiny_tokenizer)
    for other in (tokenizer, calls_alone):
        with pytest.raises(BadRow, match="leaves out the tools, such as tool 1"):
            make(other).render(CALLING)
    for supervise in ("assistant", "last", "all"):
        with pytest.raises(BadRow, match="leaves out what the assistant calls in turn 2"):
            make(tokenizer, supervise=supervise).render(replace(CALLING, tools=""))


# A template of one's own.


def test_a_template_from_a_file(tmp_path: Path, llama2: Any) -> None:
    path = tmp_path / "zephyr.jinja"
    path.write_text(FAMILIES["zephyr"].template)
    made = document(make(llama2, template=str(path)), TALK)
    assert learned(llama2, made) == [answer + "</s>" for answer in ANSWERS]
    with pytest.raises(UserError, match=r"other\.jinja cannot be read: No such file"):
        make(llama2, template=str(tmp_path / "other.jinja"))


# Answers that are not to be learned, and reasoning that is stored apart.


def with_turns(spoken: Conversation, **fields: list[Any]) -> Conversation:
    """The conversation, with a field of its answers in order."""
    turns, answers = list(spoken.turns), 0
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            turns[i] = turn._replace(**{name: values[answers] for name, values in fields.items()})
            answers += 1
    return replace(spoken, turns=tuple(turns))


@pytest.mark.parametrize("name", ["chat", "vicuna"])
def test_answer_not_to_be_learned_is_context(name: str, smollm2: Any) -> None:
    spoken = conversation("a", "WRONG one", "b", "right", "c", "WRONG two")
    marked = with_turns(spoken, learned=[False, True, False])
    end = smollm2.eos_token
    right = (" right" if name == "vicuna" else "right") + end
    for supervise in ("assistant", "last"):
        made = document(make(smollm2, template=name, supervise=supervise), marked)
        assert (
            made.input_ids.tolist()
            == document(make(smollm2, template=name), spoken).input_ids.tolist()
        )
        assert learned(smollm2, made) == [right] and made.end_learned
    made = document(make(smollm2, template=name, supervise="all"), marked)
    left_out = decode(smollm2, made.input_ids[1:][made.supervised[1:] == 0])
    wrong = ("WRONG one", "WRONG two")
    assert left_out == "".join((" " if name == "vicuna" else "") + text + end for text in wrong)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_reasoning_is_rendered_under_the_name_that_the_template_takes(
    field: str, tiny_tokenizer: Any
) -> None:
    source = (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m."
        + field
        + " %}{{ '<think>' + m."
        + field
        + " + '</think>' }}{% endif %}{{ m.content }}{{ eos_token }}\n{% endfor %}"
        + ASK
    )
    tokenizer = with_template(tiny_tokenizer, source)
    expected = ["<think>Hm.</think>5</s>"]
    for said in (
        with_turns(conversation("2 + 3?", "5"), reasoning=["Hm."]),
        conversation("2 + 3?", "<think>Hm.</think>5"),
    ):
        assert learned(tokenizer, document(make(tokenizer), said)) == expected


def test_reasoning_without_a_place_is_refused(smollm2: Any) -> None:
    said = with_turns(conversation("2 + 3?", "5"), reasoning=["Hm."])
    with pytest.raises(BadRow, match=r"turn 2 has reasoning.*<think>.*reasoning_content"):
        make(smollm2).render(said)
    with pytest.raises(BadRow, match="Vicuna prompt has no place for reasoning"):
        make(smollm2, template="vicuna").render(said)
    inside = conversation("2 + 3?", "<think>Hm.</think>5")
    made = document(make(smollm2), inside)
    assert learned(smollm2, made) == [inside.turns[1].content + smollm2.eos_token]
