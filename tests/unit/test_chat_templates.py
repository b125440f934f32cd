"""What an export's tokenizer makes of a talk is what was trained on, and what answers it."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.tokenize import ConversationTokenizer
from tests.support.documents import conversation, document, make

SYSTEM = 'You answer in "one" sentence.\nNever {{ lie }} 🙂.'
# One exchange, one of several, contents with white space around them.
TALKS = (
    conversation("Why?", "Because."),
    conversation(" Why? \n", "\n Because.  ", "Ça \\ va?", "Oui 🙂", "x" * 300, "7"),
)


@pytest.fixture
def once_spaced(llama2: Any) -> Any:
    """The Llama-2 tokenizer in its newer form: the space comes in front of a whole text only, not
    after every special token."""
    stored = json.loads(llama2.backend_tokenizer.to_str())
    spaces = {"replacement": "▁", "prepend_scheme": "first", "split": False}
    stored |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", **spaces}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture(params=["llama2", "once_spaced", "tiny_tokenizer", "smollm2"])
def tokenizer(request: pytest.FixtureRequest, origin: str) -> Any:  # which chooses llama2
    """Two that put spaces and a token in front of a text, and two that do not."""
    return request.getfixturevalue(request.param)


def check(tokenizer: Any, template: ConversationTokenizer, *talks: Conversation) -> None:
    """The tokens of whole talks, and of the prompt for each of their answers."""
    source = template.as_jinja()
    assert source is not None

    def ids(messages: list[dict[str, Any]], **switches: bool) -> list[int]:
        made: list[int] = tokenizer.apply_chat_template(
            messages, chat_template=source, return_dict=False, **switches
        )
        return made

    for talk in talks:
        whole = document(template, talk)
        messages = talk.messages()
        assert ids(messages) == whole.input_ids.tolist()
        opening = [turn.role for turn in talk.turns].index("assistant")
        prompt = ids(messages[:opening], add_generation_prompt=True)
        assert prompt == template.prompt_ids(talk)
        for end in range(opening, len(messages), 2):
            prompt = ids(messages[:end], add_generation_prompt=True)
            assert prompt == whole.input_ids[: len(prompt)].tolist()
            assert whole.supervised[len(prompt)] and not whole.supervised[len(prompt) - 1]


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("name", ["vicuna", "llama2"])
def test_talks(name: str, system: str | None, tokenizer: Any) -> None:
    template = make(tokenizer, template=name, system_prompt=system)
    own = [Conversation((Turn("system", "Briefly."), *talk.turns)) for talk in TALKS]
    check(tokenizer, template, *TALKS, *own, conversation("", "Nothing was asked."))


def test_real_talks(llama2: Any, fastchat: Path) -> None:
    rows = json.loads(gzip.decompress(fastchat.read_bytes()))[:60]
    talks = [conversation(*(turn["value"] for turn in row["conversations"])) for row in rows]
    for name in ("vicuna", "llama2"):
        check(llama2, make(llama2, template=name), *talks)


def test_alpaca(tokenizer: Any) -> None:
    template = make(tokenizer, template="alpaca")
    check(tokenizer, template, TALKS[0])
    spoken = replace(conversation("Add.", "5"), context="2 and 3")
    message = {"role": "user", "content": "Add.", "input": "2 and 3"}
    made = tokenizer.apply_chat_template(
        [message],
        chat_template=template.as_jinja(),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert made == template.prompt_ids(spoken)


@pytest.mark.parametrize(
    ("name", "roles"), [("alpaca", "uau"), ("alpaca", "su"), ("vicuna", "uu"), ("llama2", "au")]
)
def test_turns_that_the_prompt_cannot_express(name: str, roles: str, tiny_tokenizer: Any) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": "x"} for role in roles]
    source = make(tiny_tokenizer, template=name).as_jinja()
    with pytest.raises(jinja2.TemplateError, match="prompt takes"):
        tiny_tokenizer.apply_chat_template(messages, chat_template=source)


def test_a_file_is_itself(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("\n {% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    template = make(tiny_tokenizer, template=str(path))
    assert template.as_jinja() == path.read_text()


def test_a_system_prompt_in_front_of_a_template(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Whichever way a model's own template treats its turns and white space."""
    path = tmp_path / "own.jinja"
    for source in (
        "\n {% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        "{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = "
        "messages[1:] %}{% endif %}\n{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    ):
        path.write_text(source)
        template = make(tiny_tokenizer, template=str(path), system_prompt=SYSTEM)
        own = Conversation((Turn("system", "Briefly."), *TALKS[1].turns))
        check(tiny_tokenizer, template, TALKS[0], own)


def test_a_tokenizer_that_no_program_suits(llama2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads a text after a special token otherwise than the text alone, whatever is between."""
    apply = type(llama2).apply_chat_template
    monkeypatch.setattr(type(llama2), "apply_chat_template", lambda *a, **k: [0, *apply(*a, **k)])
    assert make(llama2, template="llama2").as_jinja() is None
