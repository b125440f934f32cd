"""What is learned, checked by decoding: the tokens with mask 1 say what the assistant said."""

from __future__ import annotations

import copy
import gzip
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from neftune_dist.config import UserError
from neftune_dist.data.backend import SlowBackend, backend_of, prefix_ids
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.errors import BadRow
from neftune_dist.data.formats import detect_format, to_conversation
from neftune_dist.data.spans import Chunk, Rendered, Span
from neftune_dist.data.tokenize import ConversationTokenizer, _masks
from tests.support import tiny_model
from tests.support.documents import (
    ASK,
    conversation,
    decode,
    document,
    learned,
    make,
    with_template,
)

END = "<|im_end|>"  # of SmolLM2
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content']"
    " + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
)


def rows(path: Path, number: int) -> list[Conversation]:
    loaded = json.loads(gzip.decompress(path.read_bytes()))
    kept = [row for row in loaded if row["output"].strip()][:number]
    return [to_conversation(row, detect_format(row)) for row in kept]


# The mask says what the assistant said, and that it stopped.


def test_one_turn(smollm2: Any) -> None:
    made = document(make(smollm2), conversation("What is 2 + 3?", "5"))
    assert learned(smollm2, made) == ["5" + END]
    assert made.end_learned


def test_many_turns(smollm2: Any) -> None:
    spoken = conversation("Hi", "Hello!", "And?", "", "So?", "  Bye.\n", system="Be brief.")
    made = document(make(smollm2), spoken)
    assert learned(smollm2, made) == ["Hello!" + END, END, "  Bye.\n" + END]
    assert decode(smollm2, made.input_ids).startswith("<|im_start|>system\nBe brief.")


def test_a_turn_of_the_user_at_the_end_is_not_learned(smollm2: Any) -> None:
    made = document(make(smollm2), conversation("Hi", "Hello!", "And?"))
    assert learned(smollm2, made) == ["Hello!" + END]


def test_padding_does_not_hide_the_end_of_turn(smollm2: Any) -> None:
    """pad == eos == end of turn: the token is told by its place, never by its id."""
    assert smollm2.pad_token_id == smollm2.eos_token_id
    made = document(make(smollm2), conversation("a", "b", "c", "d"))
    ends = made.input_ids == smollm2.eos_token_id
    # Turns: system, user, assistant, user, assistant.
    assert made.supervised[ends].tolist() == [0, 0, 1, 0, 1]
    assert made.input_ids[np.flatnonzero(made.supervised)[-1]] == smollm2.pad_token_id


def test_an_end_of_turn_in_the_question_is_not_learned(smollm2: Any) -> None:
    made = document(make(smollm2), conversation(f"What is {END}?", "A mark."))
    assert learned(smollm2, made) == ["A mark." + END]


@pytest.mark.parametrize(
    "answer",
    [
        "😀 漢字 é à",
        "a\n\n    def f():\n        return 1\n\n\n",
        " leading",
        "\n\nleading",
        '"Quoted"',
        ": colon",
        "#tag",
        "[1]",
        "-- dash",
        "\t tab",
        "x",
        "<|im_start|>",
        "a" * 3000,
    ],
)
def test_any_answer(answer: str, templates: list[ConversationTokenizer]) -> None:
    for template in templates:
        made = document(template, conversation("?", answer))
        assert learned(template.tokenizer, made) == [answer + template.tokenizer.eos_token]


@pytest.fixture(scope="module")
def templates(smollm2: Any, llama2: Any) -> list[ConversationTokenizer]:
    return [make(smollm2), make(smollm2, template="alpaca"), make(llama2, template="alpaca")]


@pytest.mark.parametrize("source", ["alpaca", "dolly"])
@pytest.mark.parametrize("how", ["chatml", "smollm2 alpaca", "llama2 alpaca", "llama2 chat"])
def test_real_answers(
    source: str, how: str, smollm2: Any, llama2: Any, request: pytest.FixtureRequest
) -> None:
    """On real data: the answers to the last character, and the prompt as generation is given it."""
    tokenizer = llama2 if "llama2" in how else smollm2
    if how == "llama2 chat":
        tokenizer = with_template(llama2, LLAMA2_CHAT)
    template = make(tokenizer, template="alpaca" if "alpaca" in how else "chat")
    spoken = rows(request.getfixturevalue(source), 400)
    documents = template.encode([template.render(talk) for talk in spoken])
    for talk, made in zip(spoken, documents, strict=True):
        answer = talk.turns[-1].content
        expected = f" {answer} </s>" if how == "llama2 chat" else answer + tokenizer.eos_token
        assert learned(tokenizer, made) == [expected]
        assert made.end_learned
        prompt = template.prompt_ids(talk)
        assert made.input_ids[: len(prompt)].tolist() == prompt
        assert np.flatnonzero(made.supervised)[0] == len(prompt)


def test_prompt_does_not_depend_on_whether_its_answer_is_learned(smollm2: Any) -> None:
    template = make(smollm2, template="alpaca")
    asked, answer = conversation("Hi", '"Hello!"').turns
    prompts = [
        template.prompt_ids(Conversation((asked, Turn(*answer[:-1], learned=is_learned))))
        for is_learned in (True, False)
    ]
    assert prompts[0] == prompts[1]
    assert smollm2.decode(prompts[0]).endswith("### Response:")


def test_supervise_all(smollm2: Any, llama2: Any) -> None:
    for template in (
        make(smollm2, supervise="all"),
        make(llama2, template="alpaca", supervise="all"),
    ):
        made = document(template, conversation("Hi", "Hello!"))
        assert made.supervised.tolist() == [0] + [1] * (len(made.input_ids) - 1)


@pytest.mark.parametrize("has_end", [True, False])
def test_supervise_all_reports_whether_an_end_is_learned(
    has_end: bool, tiny_tokenizer: Any
) -> None:
    turns = TURNS if has_end else TURNS.replace("{{ eos_token }}", "")
    template = make(with_template(tiny_tokenizer, turns + ASK), supervise="all")
    assert document(template, conversation("a", "b")).end_learned == has_end


def test_the_first_token_is_never_learned(tiny_tokenizer: Any) -> None:
    """Nothing comes before it: here the text begins at once."""
    made = document(make(tiny_tokenizer), Conversation((), text="one two"))
    assert decode(tiny_tokenizer, made.input_ids) == "one two</s>"
    assert made.supervised[0] == 0 and made.supervised[1:].all()


# Tokenizers with ways of their own.


def test_spaces_left_out_of_offsets_are_learned(smollm2: Any) -> None:
    """Many tokenizers trim spaces off their offsets: an indentation's are then empty."""
    backend = Tokenizer.from_str(smollm2.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trimming = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    trimming.chat_template = smollm2.chat_template
    answer = "  if x:\n        y  \n   \nelse:   z "
    encoded = trimming(answer, return_offsets_mapping=True)["offset_mapping"]
    assert any(start == stop for start, stop in encoded)
    spoken = conversation("a  \n  b  ", answer, "  c   ", answer)
    made = document(make(trimming), spoken)
    assert learned(trimming, made) == [answer + END, answer + END]


def test_an_end_that_the_tokenizer_adds_stands_once_and_not_after_a_prompt(
    tiny_tokenizer: Any,
) -> None:
    adding = copy.deepcopy(tiny_tokenizer)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert adding("a")["input_ids"][-1] == adding.eos_token_id
    template = make(adding, template="alpaca")
    spoken = conversation("Hi", '"Hello!"')
    made = document(template, spoken)
    assert made.input_ids.tolist().count(adding.bos_token_id) == 1
    assert made.input_ids.tolist().count(adding.eos_token_id) == 1
    assert learned(adding, made) == ['"Hello!"</s>']
    prompt = template.prompt_ids(spoken)
    assert adding.eos_token_id not in prompt
    assert made.input_ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("text", ["<s>Hello", "Hello"])
def test_a_beginning_stands_once(text: str, tiny_tokenizer: Any) -> None:
    """Whether the text begins with the token that the tokenizer puts in front, or not."""
    adding = copy.deepcopy(tiny_tokenizer)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    chunk = Chunk(text, (Span(0, len(text), "text", True),), starts=True)
    [made] = make(adding).encode([Rendered((chunk,))])
    assert made.input_ids[0] == 0 and made.input_ids.tolist().count(0) == 1
    assert decode(adding, made.input_ids[1:]) == "Hello"


@pytest.mark.parametrize("text", ["Hello</s>", "Hello"])
def test_an_end_stands_once(text: str, tiny_tokenizer: Any) -> None:
    """Whether the text ends with the end-of-sequence token or not."""
    chunk = Chunk(text, (Span(0, len(text), "text", True),), ends=True)
    [made] = make(tiny_tokenizer).encode([Rendered((chunk,))])
    end = tiny_tokenizer.eos_token_id
    assert made.input_ids[-1] == end and made.input_ids.tolist().count(end) == 1
    assert made.supervised[-1] == 1


def test_a_token_that_holds_an_answer_s_end_is_learned() -> None:
    """And what follows, for it begins in the answer; one that begins in front of it is not."""
    spans = [Span(0, 4, "user"), Span(4, 8, "assistant", True)]
    offsets = np.array([[0, 3], [3, 5], [5, 7], [7, 9], [9, 12]])
    supervised, _ = _masks(offsets, spans)
    assert supervised.tolist() == [0, 0, 1, 1, 0]


def test_the_later_of_two_spans_that_overlap_counts() -> None:
    answer, quoted = Span(0, 12, "assistant", True), Span(4, 8, "user")
    offsets = np.array([[0, 4], [4, 8], [8, 12]])
    supervised, speakers = _masks(offsets, [answer, quoted])
    assert supervised.tolist() == [1, 0, 1] and speakers[0] == speakers[2] != speakers[1]
    supervised, speakers = _masks(offsets, [quoted, answer])
    assert supervised.tolist() == [1, 1, 1] and len({*speakers.tolist()}) == 1


def test_llama2_alpaca_begins_with_its_token(llama2: Any) -> None:
    made = document(make(llama2, template="alpaca"), conversation("Hi", "Hello!"))
    assert made.input_ids[0] == llama2.bos_token_id
    assert made.input_ids[-1] == llama2.eos_token_id
    assert made.input_ids.dtype == np.int32 and made.supervised.dtype == np.uint8


def test_the_alpaca_prompt_is_stanford_s(smollm2: Any) -> None:
    template = make(smollm2, template="alpaca")
    assert template.render(conversation("Add {a} and {input}.", "x")).text == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd {a} and {input}.\n\n### Response:x"
    )
    spoken = Conversation((Turn("user", "Add {0}."), Turn("assistant", "x")), "1 %s")
    assert template.render(spoken).text == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {0}.\n\n### Input:\n1 %s\n\n### Response:x"
    )


def test_an_input_reaches_the_chat(smollm2: Any) -> None:
    spoken = Conversation((Turn("user", "Sort."), Turn("assistant", "1 2")), "2 1")
    assert "user\nSort.\n\n2 1" + END in make(smollm2).render(spoken).text


# Chat templates with ways of their own.


def test_a_template_that_trims(tiny_tokenizer: Any) -> None:
    trimming = with_template(tiny_tokenizer, TURNS.replace("content'] ", "content'] | trim ") + ASK)
    made = document(make(trimming), conversation("a", "\n two words  ", "b", "c"))
    assert learned(trimming, made) == ["two words</s>", "c</s>"]
    assert made.end_learned


def test_white_space_after_the_end_is_not_learned(tiny_tokenizer: Any) -> None:
    made = document(make(with_template(tiny_tokenizer, TURNS + ASK)), conversation("a", "b"))
    assert decode(tiny_tokenizer, made.input_ids).endswith("</s>\n")
    assert made.supervised[-1] == 0
    assert learned(tiny_tokenizer, made) == ["b</s>"]


def test_a_template_without_an_end_of_turn_is_reported(tiny_tokenizer: Any) -> None:
    endless = with_template(tiny_tokenizer, TURNS.replace("{{ eos_token }}", "") + ASK)
    made = document(make(endless), conversation("a", "b"))
    assert learned(tiny_tokenizer, made) == ["b"]
    assert not made.end_learned


def test_a_template_that_shortens_earlier_turns_learns_them_in_their_own_documents(
    tiny_tokenizer: Any,
) -> None:
    """As those of reasoning models do, which drop the reasoning of all turns but the last."""
    forgetting = with_template(
        tiny_tokenizer,
        TURNS.replace(
            "{{ m['content'] }}",
            "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}",
        )
        + ASK,
    )
    template = make(forgetting)
    thought = "<think>hm</think>yes"
    assert learned(forgetting, document(template, conversation("a", thought))) == [thought + "</s>"]
    spoken = conversation("a", "b", "c", thought, "d", "e")
    made = template.encode([rendered for _, rendered in template.documents(spoken)])
    expected = [[thought + "</s>"], ["b</s>", "e</s>"]]
    assert [learned(forgetting, document) for document in made] == expected
    with pytest.raises(BadRow, match="renders turn 4 differently once later turns follow"):
        make(forgetting, split_conversations="never").render(spoken)


def test_a_generation_prompt_that_no_turn_begins_with_is_refused(tiny_tokenizer: Any) -> None:
    other = with_template(
        tiny_tokenizer, TURNS + ASK.replace("<|assistant|>\n", "<|assistant|>\nSure: ")
    )
    with pytest.raises(BadRow, match="generation prompt is not what turn 2 begins with"):
        make(other).render(conversation("a", "b"))


def test_a_prompt_that_is_in_a_template_already_is_refused(smollm2: Any, tmp_path: Path) -> None:
    """As TRL's prompt-completion rows often are; a template that writes turns alone trains them."""
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for prompt in (asked, "[INST] Hi [/INST]", "### Instruction:\nHi\n\n### Response:"):
        for template in ({}, {"template": "alpaca"}):
            with pytest.raises(BadRow, match="in a template already"):
                make(smollm2, **template).documents(conversation(prompt, "5"))
    plain = tmp_path / "plain.jinja"
    plain.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    made = document(make(smollm2, template=str(plain)), conversation(asked, "5" + END))
    assert decode(smollm2, made.input_ids) == asked + "5" + END
    assert learned(smollm2, made) == ["5" + END] and made.end_learned


def test_a_turn_that_holds_its_end_already_is_refused(smollm2: Any, tmp_path: Path) -> None:
    """Its end would be trained on twice, or another model's as words."""
    for said in ("5" + END, f"5{END}\n", "5</s>", "5 <|endoftext|>"):
        with pytest.raises(BadRow, match=r"turn 2 ends with '<.*behind it: give it without"):
            make(smollm2).documents(conversation("Hi", said))
    with pytest.raises(BadRow, match="turn 1 ends with"):
        make(smollm2).documents(conversation("Hi" + END, "5"))
    for template in ("alpaca", "vicuna", "llama2"):
        with pytest.raises(BadRow, match="turn 2 ends with '</s>'"):
            make(smollm2, template=template).documents(conversation("Hi", "5</s>"))
    with pytest.raises(BadRow, match="turn 2 ends with"):  # reads no text as a special token
        make(smollm2, template="llama2").documents(conversation("Hi", "5" + END))
    # Trained on once, or words of HTML.
    made = document(make(smollm2, template="alpaca"), conversation("Hi", "5" + END))
    assert learned(smollm2, made) == ["5" + END]
    document(make(smollm2), conversation("Strike 5 out.", "<s>5</s>"))


def test_a_generation_prompt_may_open_a_thought(tiny_tokenizer: Any) -> None:
    """As R1's: an answer without reasoning is learned as the template writes it, and reasoning that
    the template takes out follows the prompt, as it is generated."""
    taking = TURNS.replace("m['content']", "m['content'].split('</think>')[-1]")
    ask = ASK.replace("<|assistant|>\n", "<|assistant|>\n<think>\n")
    opening = with_template(tiny_tokenizer, taking + ask)
    made = document(make(opening), conversation("a", "b"))
    assert learned(opening, made) == ["b</s>"]
    assert decode(opening, made.input_ids) == "<|user|>\na</s>\n<|assistant|>\nb</s>\n"
    for said in ("<think>\nhm\n</think>\n\nb", "hm</think>b"):
        made = document(make(opening), conversation("a", said))
        assert learned(opening, made) == ["hm\n</think>\n\nb</s>"]
        assert decode(opening, made.input_ids[made.supervised == 0]).endswith("\n<think>\n\n")


def test_a_template_that_changes_the_answer_is_refused(tiny_tokenizer: Any) -> None:
    """In upper case, or cut (which would write a list of parts as Python shows it)."""
    for role, turn, changed in (
        ("user", 1, "| upper"),
        ("assistant", 2, "| upper"),
        ("user", 1, "[:6]"),
    ):
        shouted = f"m['content'] {changed} if m['role'] == '{role}' else m['content']"
        shouting = with_template(tiny_tokenizer, TURNS.replace("m['content']", shouted) + ASK)
        with pytest.raises(BadRow, match=f"changes what the {role} says in turn {turn}"):
            make(shouting).render(conversation("a", "b"))


@pytest.mark.parametrize(
    "broken",
    [
        "{{ raise_exception('System role not supported') }}",
        "{{ messages[7]['content'] }}",
        "{{ messages + 5 }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_that_fails_spoils_the_row_only(broken: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(BadRow, match="the chat template refuses the turns"):
        make(with_template(tiny_tokenizer, broken)).render(conversation("a", "b"))


@pytest.mark.parametrize("broken", ["\n{% for m in messages %}", "\n{{ messages | shout }}"])
def test_a_template_that_is_no_jinja_is_not_the_rows_mistake(
    broken: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=r"^The chat template is no valid Jinja: line 2: "):
        make(with_template(tiny_tokenizer, broken)).render(conversation("a", "b"))


def test_today_s_date_does_not_enter(tiny_tokenizer: Any) -> None:
    dated = with_template(
        tiny_tokenizer,
        "\nToday: {{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}\n" + TURNS + ASK,
    )
    text = make(dated).render(conversation("a", "b")).text
    assert text.startswith("\nToday: 26 Jul 2024 2024-07-26\n<|user|>")


def test_the_alpaca_prompt_takes_one_question_and_one_answer(smollm2: Any) -> None:
    template = make(smollm2, template="alpaca")
    for spoken in (conversation("a", "b", "c", "d"), conversation("a", "b", system="s")):
        with pytest.raises(BadRow, match="takes one instruction and one answer"):
            template.render(spoken)


# Tokenizers that will not do.


def test_a_tokenizer_without_chat_template(llama2: Any) -> None:
    name = Path(llama2.name_or_path).name
    with pytest.raises(UserError, match=rf"{name} has no chat template.*data\.template=alpaca"):
        make(llama2)


def test_a_tokenizer_without_end_of_sequence(tiny_tokenizer: Any) -> None:
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        make(endless, template="alpaca")


def slow_tokenizers(folder: Path) -> dict[str, Any]:
    """Three that are written in Python: one of bytes, one of words that keeps no white space, one
    whose tokens of white space do not say what they stand for."""
    words = [f"{letter}{end}" for letter in string.ascii_letters + ".?!" for end in ("", "@@")]
    words += ["<unk>", "th@@", "the"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    made = {"bytes": transformers.ByT5Tokenizer(), "words": transformers.CTRLTokenizer(*files)}
    names = [*string.ascii_letters + ".?!<>|/", "<SP>", "<BR>", "<|endoftext|>", "<|startoftext|>"]
    (folder / "vocab.txt").write_text("\n".join(names))
    (folder / "emoji.json").write_text('{"emoji": {}, "emoji_inv": {}}')
    files = (str(folder / "vocab.txt"), str(folder / "emoji.json"))
    made["names"] = transformers.GPTNeoXJapaneseTokenizer(*files)
    for tokenizer in made.values():
        tokenizer.add_special_tokens({"eos_token": "</s>"})
        tokenizer.chat_template = TURNS + ASK
    return made


@pytest.mark.parametrize("name", ["bytes", "words", "names"])
def test_a_tokenizer_in_python(name: str, tmp_path: Path) -> None:
    """Its tokens are those of the whole text; offsets are found by what the tokens say."""
    tokenizer = slow_tokenizers(tmp_path)[name]
    said = "Près de the 🙂." if name == "bytes" else "the other the."
    template = make(tokenizer)
    spoken = conversation("Say the.", said, "And?", "Yes.")
    made = document(template, spoken)
    text = template.render(spoken).text
    assert list(made.input_ids) == tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer.encode(f"{said}</s>Yes.</s>", add_special_tokens=False)
    assert list(made.input_ids[made.supervised == 1]) == expected
    assert made.end_learned
    if name == "names":
        offsets = SlowBackend(tokenizer).encode_batch(["a\n b\n"])[0].offsets
        assert offsets == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    if name == "words":
        offsets = SlowBackend(tokenizer).encode_batch(["the \tno the"])[0].offsets
        assert offsets == [(0, 3), (5, 7), (5, 7), (8, 11)]
    literal = SlowBackend(tokenizer, literal=True).encode_batch(["a</s>"])[0]
    assert tokenizer.eos_token_id not in literal.ids
    assert SlowBackend(tokenizer).encode_batch(["a</s>"])[0].ids[-1] == tokenizer.eos_token_id
    same, more = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    more.add_tokens(["new"])
    digests = [SlowBackend(each).to_str() for each in (tokenizer, same, more)]
    assert digests[0] == digests[1] != digests[2]


def test_a_tokenizer_in_python_that_changes_the_text(tmp_path: Path) -> None:
    tokenizer = slow_tokenizers(tmp_path)["words"]
    whole = tokenizer.tokenize
    for changed, place in (
        (lambda text, **_: whole(text.lower()), r"'Say\."),
        (lambda text, **_: whole(text)[:-1], "'</s>'"),
    ):
        tokenizer.tokenize = changed
        with pytest.raises(BadRow, match=f"in Python, changes the text at {place}"):
            make(tokenizer).documents(conversation("Say.", "no."))


def test_prefix_of_a_tokenizer_in_python_that_does_not_mark_it() -> None:
    class Begins(transformers.ByT5Tokenizer):
        def build_inputs_with_special_tokens(self, ids: list[int], pair: Any = None) -> list[int]:
            return [1, 2, *ids, 1]

        def get_special_tokens_mask(self, ids: list[int], *more: Any, **also: Any) -> list[int]:
            return [0] * len(ids)

    assert prefix_ids(Begins()) == [1, 2]


def test_bytes_of_unknown_characters_are_their_own_tokens() -> None:
    """A Unigram model gives all bytes of "\n\n🙂é" one range: no answer may get another's bytes,
    nor a space that the whole text does not have."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = [(name, -9.0) for name in ["<unk>", "</s>", *names, "▁", *string.ascii_letters + ":."]]
    backend = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # puts a space before any text
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:\n\n{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n\n{% endif %}"
    )
    made = document(make(tokenizer), conversation("🙂", "é🙂.", "\n", "🙂"))
    text = "user:\n\n🙂assistant:\n\né🙂.</s>user:\n\n\nassistant:\n\n🙂</s>"
    assert made.input_ids.tolist() == tokenizer.encode(text)
    expected = [f"<0x{byte:02X}>" for byte in "é🙂".encode()] + [".", "</s>"]
    expected += [f"<0x{byte:02X}>" for byte in "🙂".encode()] + ["</s>"]
    assert tokenizer.convert_ids_to_tokens(made.input_ids[made.supervised == 1]) == expected


def test_unknown_characters_after_a_line_break_get_no_space() -> None:
    """A Unigram model without bytes joins them with the break, so that no break can take the space
    that it puts before any text."""
    vocab = [(name, -9.0) for name in ["<unk>", "</s>", "▁", *string.ascii_letters + ":."]]
    backend = Tokenizer(models.Unigram(vocab, 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = TURNS + ASK
    made = document(make(tokenizer), conversation("Say.", "🙂 no."))
    expected = ["<unk>", "▁", "n", "o", ".", "</s>"]
    assert tokenizer.convert_ids_to_tokens(made.input_ids[made.supervised == 1]) == expected


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "Unigram", "BPE"])
def test_tokenizer_without_an_unknown_token_refuses_a_text(kind: str) -> None:
    """An error of the row, also while the tokenizer and its template are probed."""
    vocab = {"b": 0, "c": 1, "</s>": 2}
    settings: dict[str, Any] = {"unk_token": "[X]"} if kind == "BPE" else {}
    given = [(name, -1.0) for name in vocab] if kind == "Unigram" else vocab
    model = getattr(models, kind)(given, *([[]] if kind == "BPE" else []), **settings)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' %' }}{% endfor %}"
    template = make(tokenizer)
    with pytest.raises(BadRow, match=r"the tokenizer refuses the text: .*(unknown|[Uu]nk|UNK)"):
        template.documents(conversation("b", "c"))
    assert template.end_of_turn == (
        [2],
        "the chat template ends an answer with %, which is no token",
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    made = document(make(tokenizer), conversation("b", "c b"))
    assert made.input_ids.tolist() == [0, 2, 1, 0, 2] and made.end_learned
    assert make(tokenizer, template="llama2").as_jinja() is None  # which needs other characters


def test_literal_tokenizer_reads_special_tokens_as_text(tmp_path: Path) -> None:
    """Copies are shared, and one does not become the other; a token added later is in the next."""
    tokenizer = tiny_model.make_tokenizer(tmp_path)
    for _ in range(2):
        assert len(backend_of(tokenizer, literal=True).encode("</s>").ids) > 1
        assert backend_of(tokenizer).encode("</s>").ids == [tokenizer.eos_token_id]
    tokenizer.add_tokens(["<|new|>"])
    assert len(backend_of(tokenizer).encode("<|new|>").ids) == 1
