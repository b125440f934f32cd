"""The fixed prompts against the code that first trained with them, written here once more."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neftune_dist.config import UserError, load_config
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.errors import BadRow
from neftune_dist.data.spans import SPEAKERS
from tests.support.documents import conversation, decode, document, learned, make

SYSTEM = "You answer in one sentence.\nNever lie."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
ROWS = 150


@pytest.fixture(scope="module")
def talks(alpaca: Path, fastchat: Path) -> list[Conversation]:
    """Real ones, of one exchange and of several, among them answers with white space around."""
    rows = [row for row in json.loads(gzip.decompress(alpaca.read_bytes())) if row["output"]]
    long = json.loads(gzip.decompress(fastchat.read_bytes()))[:ROWS]
    return [
        *(conversation(row["instruction"], row["output"]) for row in rows[:ROWS]),
        *(conversation(*(turn["value"] for turn in row["conversations"])) for row in long),
        conversation(" Why? \n", "\n Because.  ", "Is </s> a token?", "It is </s> or <s>."),
        conversation("And now?", "Now.", "Unanswered"),
    ]


@pytest.fixture(scope="module")
def plain(llama2: Any) -> Any:
    """The Llama-2 tokenizer as sentencepiece is: no text is a special token."""
    backend = llama2.backend_tokenizer
    copied = type(backend).from_str(backend.to_str())
    copied.encode_special_tokens = True
    return copied


def meta(plain: Any, spoken: Conversation, system: str) -> tuple[list[int], list[int]]:
    """input_ids and mask by Meta's reference: exchanges are encoded one by one between the two
    tokens, as plain text; what stands after [/INST] is learned, the end token too."""
    contents = [turn.content for turn in spoken.turns]
    if system:
        contents[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{contents[0]}"
    ids: list[int] = []
    mask: list[int] = []
    for question, answer in zip(contents[::2], [*contents[1::2], None], strict=False):
        prompt = f"[INST] {question.strip()} [/INST]"
        asked = [1, *plain.encode(prompt, add_special_tokens=False).ids]
        both = asked
        if answer is not None:
            text = f"{prompt} {answer.strip()} "
            both = [1, *plain.encode(text, add_special_tokens=False).ids, 2]
        assert both[: len(asked)] == asked
        ids += both
        mask += [0] * len(asked) + [1] * (len(both) - len(asked))
    return ids, mask


@pytest.mark.parametrize("where", ["nowhere", "in the row", "in the configuration"])
def test_llama2_is_meta_s(where: str, talks: list[Conversation], llama2: Any, plain: Any) -> None:
    system = "" if where == "nowhere" else SYSTEM
    in_row = where == "in the row"
    template = make(llama2, template="llama2", system_prompt=None if in_row else system or None)
    for talk in talks:
        spoken = talk
        if in_row:
            spoken = Conversation((Turn("system", system), *talk.turns))
        made = document(template, spoken)
        ids, mask = meta(plain, talk, system)
        assert made.input_ids.tolist() == ids
        assert made.supervised.tolist() == mask
        assert made.end_learned
        prompt = template.prompt_ids(spoken)
        assert prompt == ids[: mask.index(1)]
    if system:
        said = made.input_ids[made.speakers == SPEAKERS.index("system")]
        assert decode(llama2, said).strip() == SYSTEM


def fastchat_reference(
    tokenizer: Any, spoken: Conversation, system: str
) -> tuple[list[int], list[int]]:
    """input_ids and mask as FastChat makes them: the whole text is tokenised at once; its turns
    are counted token by token, two of them for what the tokenizer puts in front and the space
    after "ASSISTANT:"."""
    text = system
    for i, turn in enumerate(spoken.turns):
        name, mark = (" USER", "") if i % 2 == 0 else (" ASSISTANT", "</s>")
        text += f"{name if i % 2 or i == 0 else name[1:]}: {turn.content}{mark}"
    ids = tokenizer(text)["input_ids"]
    mask = [0] * len(ids)
    place = 1
    for exchange in text.split("</s>")[:-1]:
        asked = exchange.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        begin = place + len(tokenizer(asked)["input_ids"]) - 2
        place += len(tokenizer(exchange)["input_ids"])
        mask[begin:place] = [1] * (place - begin)
    return ids, mask


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_vicuna_is_fastchat_s(system: str, talks: list[Conversation], llama2: Any) -> None:
    template = make(llama2, template="vicuna", system_prompt=system or None)
    for talk in talks[:-2]:
        made = document(template, talk)
        ids, mask = fastchat_reference(llama2, talk, system or VICUNA)
        assert made.input_ids.tolist() == ids
        assert made.supervised.tolist() == mask
        assert template.prompt_ids(talk) == ids[: mask.index(1)]


@pytest.mark.parametrize("kind", ["tiny_tokenizer", "smollm2"])
def test_other_tokenizers(
    kind: str, talks: list[Conversation], request: pytest.FixtureRequest
) -> None:
    """Whose padding is their end token, and which put nothing in front of a text."""
    tokenizer = request.getfixturevalue(kind)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    end = tokenizer.eos_token
    for name, said in (("vicuna", " {}" + end), ("llama2", " {} " + end)):
        template = make(tokenizer, template=name)
        for talk in [*talks[:20], *talks[-22:-2]]:
            made = document(template, talk)
            answers = [turn.content for turn in talk.turns if turn.role == "assistant"]
            answers = [answer.strip() if name == "llama2" else answer for answer in answers]
            assert learned(tokenizer, made) == [said.format(answer) for answer in answers]
            prompt = template.prompt_ids(talk)
            assert made.input_ids[: len(prompt)].tolist() == prompt
            assert np.flatnonzero(made.supervised)[0] == len(prompt)


@pytest.mark.parametrize("name", ["vicuna", "llama2"])
def test_the_last_answer_alone(name: str, llama2: Any) -> None:
    spoken = conversation("a", "one", "b", "two", "c")
    made = document(make(llama2, template=name, supervise="last"), spoken)
    everything = document(make(llama2, template=name, supervise="all"), spoken)
    assert [text.strip() for text in learned(llama2, made)] in (["two</s>"], ["two </s>"])
    assert everything.input_ids.tolist() == made.input_ids.tolist()
    assert everything.supervised[1:].all()
    says = SPEAKERS.index("assistant")
    assert decode(llama2, made.input_ids[made.speakers == says]).split()[0].startswith("one")


@pytest.mark.parametrize("name", ["vicuna", "llama2"])
@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("uua", "turn 2 is of the role user, not assistant"),
        ("usa", "turn 2 is of the role system, not assistant"),
        ("suata", "turn 4 is of the role tool, not user"),
        ("au", "turn 1 is of the role assistant, not user"),
    ],
)
def test_turns_out_of_order(name: str, roles: str, message: str, llama2: Any) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    spoken = Conversation(tuple(Turn(names[role], "x") for role in roles))
    with pytest.raises(BadRow, match=message):
        make(llama2, template=name).render(spoken)


def test_what_a_fixed_prompt_has_no_place_for(llama2: Any) -> None:
    calling = (Turn("user", "a"), Turn("assistant", "", '[{"function": {"name": "f"}}]'))
    for name, said in (("alpaca", "Alpaca"), ("vicuna", "Vicuna"), ("llama2", "Llama-2")):
        for spoken in (Conversation(calling), Conversation(calling[:1], tools="[]")):
            with pytest.raises(BadRow, match=f"the {said} prompt has no place for tools"):
                make(llama2, template=name).render(spoken)
    with pytest.raises(BadRow, match=r"turn 2 holds \[/INST\], a mark of the Llama-2 prompt"):
        make(llama2, template="llama2").render(conversation("a", "b [/INST] c"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.template=vicunia"], r"allowed: chat, alpaca, vicuna, llama2, or the path of a"),
        (
            ["data.template=alpaca", "data.system_prompt=Hi."],
            "system_prompt=Hi. has no effect with",
        ),
        (["data.supervise=first"], r"allowed: assistant, last, all"),
    ],
)
def test_settings_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, ["model.name_or_path=m", *words])
