"""Rows and templates as people have them: documents that are written out here by hand."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from neftune_dist.checkpoint.run_files import keep_end_tokens, write_run_files
from neftune_dist.config import Config, DataConfig, ModelConfig, UserError
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.dataset import prepare
from neftune_dist.data.errors import BadRow
from neftune_dist.model import load
from tests.support import tiny_model
from tests.support.documents import conversation, decode, document, learned, make, with_template
from tests.support.shared_data import shared

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n"
CHATML = HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}" + ASK + "{% endif %}"
# As in ../shared/cases/rows, for clones that lack it.
TEMPLATES = {
    "06_last_ends_otherwise": CHATML.replace(
        "<|im_end|>",
        "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}",
    ),
    "06_thinking_prompt": HEAD
    + "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    + ASK
    + "{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else "
    "'<think>\n' }}{% endif %}",
    "09_reasoning_from_a_field": HEAD
    + "{% if m.role == 'assistant' %}{{ '<think>\n' + (m.reasoning_content or '') + "
    "'\n</think>\n\n' }}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    + ASK
    + "{{ '<think>\n' }}{% endif %}",
    "14_clock": "<|im_start|>system\nToday is {{ strftime_now('%A, %d %B %Y, %H:%M') }}<|im_end|>\n"
    + CHATML,
    "19_last_exchange": CHATML.replace(
        "{% for m in messages %}",
        "{% set said = messages[-2:] if messages[-1].role == 'assistant' else messages[-1:] %}"
        "{% for m in said %}",
    ),
    "20_bom": "\ufeff" + CHATML,
}
FIRST = "<|im_start|>user\nFirst?<|im_end|>\n<|im_start|>assistant\n"
SECOND = "<|im_end|>\n<|im_start|>user\nSecond?<|im_end|>\n<|im_start|>assistant\n"
TALK = conversation("First?", "One.", "Second?", "Two.")
SUM = "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n<think>\n"
EMPTY = "<think>\n\n</think>\n\n"
# By template and conversation: the documents, with what is learned between « and ».
EXPECTED = {
    ("06_last_ends_otherwise", TALK): [
        f"{FIRST}«One.<|endoftext|>»\n",
        f"{FIRST}One.{SECOND}«Two.<|endoftext|>»\n",
    ],
    ("06_thinking_prompt", TALK): [
        f"{FIRST}{EMPTY}«One.<|im_end|>»\n",
        f"{FIRST}One.{SECOND}{EMPTY}«Two.<|im_end|>»\n",
    ],
    ("09_reasoning_from_a_field", conversation("2+3?", "<think>\ntwo and three\n</think>\n\n5")): [
        f"{SUM}«two and three\n</think>\n\n5<|im_end|>»\n"
    ],
    (
        "09_reasoning_from_a_field",
        Conversation((Turn("user", "2+3?"), Turn("assistant", "5", reasoning="two and three"))),
    ): [f"{SUM}«two and three\n</think>\n\n5<|im_end|>»\n"],
    ("09_reasoning_from_a_field", conversation("2+3?", "5")): [
        f"{SUM}«\n</think>\n\n5<|im_end|>»\n"
    ],
    ("14_clock", TALK): [
        "<|im_start|>system\nToday is Friday, 26 July 2024, 00:00<|im_end|>\n"
        f"{FIRST}«One.<|im_end|>»{SECOND.removeprefix('<|im_end|>')}«Two.<|im_end|>»\n"
    ],
    ("20_bom", TALK): [
        f"{FIRST}«One.<|im_end|>»{SECOND.removeprefix('<|im_end|>')}«Two.<|im_end|>»\n"
    ],
}


@pytest.fixture(params=["inline", "shared"])
def template_file(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Maps a template's name to its file, written here or of the shared cases."""

    def find(name: str) -> str:
        if request.param == "shared":
            return str(shared(f"cases/rows/{name}.jinja"))
        path = tmp_path / f"{name}.jinja"
        path.write_text(TEMPLATES[name])
        return str(path)

    return find


def marked(tokenizer: Any, spoken: Conversation, **data: Any) -> list[str]:
    """The documents of a conversation, with what is learned between « and »."""
    template = make(tokenizer, **data)
    texts = []
    for made in template.encode([rendered for _, rendered in template.documents(spoken)]):
        runs, inside = [], False
        for i, is_learned in enumerate([*made.supervised.tolist(), 0]):
            if bool(is_learned) != inside:
                runs.append(i)
                inside = bool(is_learned)
        edges = [0, *runs, len(made.input_ids)]
        pieces = [decode(tokenizer, made.input_ids[a:b]) for a, b in pairwise(edges)]
        texts.append("".join(f"«{text}»" if k % 2 else text for k, text in enumerate(pieces)))
    return texts


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: case[0])
def test_documents_are_those_written_by_hand(
    case: tuple[str, Conversation], template_file: Any, smollm2: Any
) -> None:
    name, spoken = case
    assert marked(smollm2, spoken, template=template_file(name)) == EXPECTED[case]


def test_split_rows_are_counted_and_held_out_whole(
    tiny_tokenizer: Any, write: Any, tmp_path: Path
) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(TEMPLATES["06_last_ends_otherwise"].replace("<|im_end|>", "</s>"))
    roles = ("user", "assistant", "user", "assistant")
    rows = [
        {
            "messages": [
                {"role": role, "content": f"{n} {word}"}
                for role, word in zip(roles, "abcd", strict=True)
            ]
        }
        for n in range(10)
    ]
    config = write(rows, template=str(path), num_held_out=4)
    dataset = prepare(config, tiny_tokenizer)
    report = dataset.report
    assert (report.num_rows, report.num_split, report.num_added_by_split) == (10, 10, 10)
    assert report.num_documents + report.num_held_out == 20 and report.num_held_out == 4
    assert any("10 rows became 20 documents" in line for line in report.lines())
    held_out = [dataset.held_out_conversations[i] for i in range(4)]
    assert sorted(len(talk.turns) for talk in held_out) == [2, 2, 4, 4]
    assert len({talk.turns[0].content for talk in held_out}) == 2
    for talk, i in zip(held_out, range(4), strict=True):
        ids, supervised = dataset.held_out[i]
        expected = f"{talk.turns[-1].content}<|endoftext|>"
        assert decode(tiny_tokenizer, ids[supervised == 1]) == expected
    # A share of the documents, not of the rows: the longer half is cut.
    longest = int(dataset.train.lengths.max())
    half = prepare(replace(config, max_length=longest - 1), tiny_tokenizer).report
    assert half.num_truncated == 10
    with pytest.raises(UserError, match="10 of 20 documents would be cut or lost"):
        prepare(replace(config, max_length=longest - 1, max_cut_fraction=0.49), tiny_tokenizer)
    never = write(rows, template=str(path), split_conversations="never")
    with pytest.raises(UserError, match="turn 2 differently"):
        prepare(never, tiny_tokenizer)


def test_half_of_an_equal_exchange_is_missed(template_file: Any, smollm2: Any) -> None:
    """19: whatever the words are."""
    spoken = conversation("Next.", "Go left.", "Next.", "Go left.")
    with pytest.raises(BadRow, match="leaves out or changes what the user says in turn 1"):
        make(smollm2, template=template_file("19_last_exchange")).render(spoken)
    whole = document(make(smollm2), spoken)
    assert learned(smollm2, whole) == ["Go left.<|im_end|>"] * 2


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_turn_that_is_there_twice_is_refused(role: str, smollm2: Any) -> None:
    twice = CHATML.replace(
        "{{ m.content }}", f"{{{{ m.content * (2 if m.role == '{role}' else 1) }}}}"
    )
    spoken = conversation("a", "b", system="s")
    with pytest.raises(BadRow, match=f"writes what the {role} says in turn . 2 times"):
        make(with_template(smollm2, twice)).render(spoken)


@pytest.mark.parametrize(
    "said",
    ["<think>a</think><think>b</think>4", "Well. <think>a</think>4", "Write </think> after it."],
)
def test_several_thoughts_are_not_written_as_one(said: str, smollm2: Any) -> None:
    tokenizer = with_template(smollm2, TEMPLATES["09_reasoning_from_a_field"])
    with pytest.raises(BadRow, match="turn 2 has several thoughts, or '</think>' inside the answ"):
        make(tokenizer).render(conversation("2+3?", said))


def test_tool_without_its_description_is_missed(smollm2: Any) -> None:
    schema = {"type": "object", "properties": {"word": {"type": "string"}}}
    function = {"name": "search", "description": "Finds a word.", "parameters": schema}
    spoken = Conversation(
        (Turn("user", "a"), Turn("assistant", "b")),
        tools=json.dumps([{"type": "function", "function": function}]),
    )
    names = "{{ t.function.name }}({{ t.function.parameters.properties.keys() | join(', ') }})"
    for more in ("", " {{ t.function.description }}"):
        source = "{% for t in tools or [] %}" + names + more + "\n{% endfor %}" + CHATML
        template = make(with_template(smollm2, source))
        if more:
            assert "search(word) Finds a word.\n" in template.render(spoken).text
            continue
        with pytest.raises(BadRow, match="leaves out the tools, such as tool 1"):
            template.render(spoken)


def test_added_token_that_is_not_special_ends_an_answer(smollm2: Any) -> None:
    tokenizer = with_template(smollm2, CHATML.replace("<|im_end|>", "<|done|>"))
    tokenizer.add_tokens(["<|done|>"])
    template = make(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|done|>")
    assert template.end_of_turn == ([tokenizer.eos_token_id, end], "")
    assert document(template, conversation("a", "b")).end_learned


@pytest.mark.parametrize("question", ["Please search for cats.", "Please find cats."])
def test_tool_named_in_the_question_is_missed_all_the_same(question: str, smollm2: Any) -> None:
    """17."""
    schema = {"type": "object", "properties": {"query": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "search", "parameters": schema}}
    spoken = Conversation(
        (Turn("user", question), Turn("assistant", "I did: cats purr.")), tools=json.dumps([tool])
    )
    with pytest.raises(BadRow, match="leaves out the tools, such as tool 1"):
        make(smollm2).render(spoken)
    names = "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
    with pytest.raises(BadRow, match="leaves out the tools, such as tool 1"):
        make(with_template(smollm2, names + CHATML)).render(spoken)
    whole = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML
    made = document(make(with_template(smollm2, whole)), spoken)
    assert learned(smollm2, made) == ["I did: cats purr.<|im_end|>"]


def test_words_of_a_turn_do_not_matter(smollm2: Any) -> None:
    """Answers that stand in the question, in each other or in the template's own words."""
    spoken = conversation("user", "assistant", "assistant\nuser", "a", "a", "user", system="a")
    made = document(make(smollm2), spoken)
    assert learned(smollm2, made) == [f"{said}<|im_end|>" for said in ("assistant", "a", "user")]


def test_words_like_marks_are_words(smollm2: Any) -> None:
    """Also where they stand in tools, which are rendered as they are."""
    mark = "Zq8vK1c0Wj"
    made = document(make(smollm2), conversation(mark, f"{mark}Zq8vK0c0Wj", "a", mark))
    assert learned(smollm2, made) == [f"{mark}Zq8vK0c0Wj<|im_end|>", f"{mark}<|im_end|>"]
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": mark, "parameters": schema}}
    template = make(
        with_template(smollm2, "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)
    )
    for name in (mark, "Zq8vK9c9Wj"):
        tool["function"] = {"name": name, "parameters": schema}
        spoken = Conversation(TALK.turns, tools=json.dumps([tool]))
        with pytest.raises(BadRow, match="words with which chat templates are checked"):
            template.render(spoken)


def test_long_conversation_takes_linear_time(smollm2: Any) -> None:
    """A template that changes every earlier answer, within the limit of one conversation."""
    ending = TEMPLATES["06_last_ends_otherwise"]
    spoken = conversation(*(f"{i} words of a turn" for i in range(160)))
    documents = make(with_template(smollm2, ending)).documents(spoken)
    assert [len(part.turns) for part, _ in documents] == list(range(2, 161, 2))


def test_template_is_chosen_by_the_row_s_tools(smollm2: Any) -> None:
    """25 and 16."""
    with_tools = "Tools: {{ tools | tojson }}\n" + CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    tool["function"]["parameters"] = {"type": "object", "properties": {"x": {"type": "integer"}}}
    calling = Conversation(
        (Turn("user", "Do."), Turn("assistant", "", json.dumps([call]))), tools=json.dumps([tool])
    )
    named = with_template(smollm2, {"default": "\n" + CHATML + "\n\n", "tool_use": with_tools})
    template = make(named)
    for spoken in (calling, TALK):
        expected = named.apply_chat_template(
            spoken.messages(), tools=json.loads(spoken.tools or "null"), tokenize=False
        )
        assert template.render(spoken).text == expected
    source = template.as_jinja()
    assert source is not None
    named = with_template(smollm2, {"tool_use": with_tools, "rag": with_tools})
    assert make(named).render(calling).text.startswith("Tools: [")
    with pytest.raises(BadRow, match="templates are rag, tool_use: none is the default"):
        make(named).render(TALK)
    with pytest.raises(UserError, match=r"are rag, none of them named default.*data\.template"):
        make(with_template(smollm2, {"rag": with_tools}))


def test_run_keeps_a_folder_of_templates_as_one(tmp_path: Path) -> None:
    model = tiny_model.make_model(tmp_path / "base")
    (model / "additional_chat_templates").mkdir()
    with_tools = "{{ tools | tojson }}\n" + CHATML
    (model / "additional_chat_templates" / "tool_use.jinja").write_text(with_tools)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert set(tokenizer.chat_template) == {"default", "tool_use"}
    (model / "tekken.json").write_text("{}")  # mistral-common's, with a template of its own
    source = make(tokenizer).as_jinja()
    write_run_files(tmp_path, Config(), model, tokenizer, SimpleNamespace(), source)
    assert (tmp_path / "model" / "tekken.json").exists()
    kept = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = TALK.messages()
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        before, after = (
            loaded.apply_chat_template(messages, tools=tools, tokenize=False)
            for loaded in (tokenizer, kept)
        )
        assert before == after
    config = Config(data=DataConfig(system_prompt="Be brief."))
    write_run_files(tmp_path, config, model, tokenizer, SimpleNamespace(), source)
    assert not (tmp_path / "model" / "tekken.json").exists()


def test_arguments_are_text_where_the_template_takes_text(smollm2: Any) -> None:
    calls = (
        "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + c.function.arguments }}"
    )
    template = make(
        with_template(
            smollm2, CHATML.replace("{{ m.content }}", "{{ m.content }}" + calls + "{% endfor %}")
        )
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
    spoken = Conversation((Turn("user", "Do."), Turn("assistant", "", json.dumps([call]))))
    assert learned(smollm2, document(template, spoken)) == ['<call>f{"x": "é"}<|im_end|>']


# Ends that can be learned.


def test_end_that_is_no_token_is_reported_with_the_tokens_to_add(
    llama2: Any, write: Any, tmp_path: Path
) -> None:
    """12."""
    path = tmp_path / "chatml.jinja"
    path.write_text(CHATML)
    rows = [{"instruction": "Say hi.", "output": "Hi there."}]
    report = prepare(write(rows, template=str(path)), llama2).report
    assert report.audit.end_of_turn_learned == 0
    [line] = [line for line in report.lines() if "no end of turn is supervised" in line]
    assert "<|im_end|>" in line and "model.add_tokens='<|im_start|>,<|im_end|>'" in line
    added = copy.deepcopy(llama2)
    added.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    template = make(added, template=str(path))
    end = added.convert_tokens_to_ids("<|im_end|>")
    assert template.end_of_turn == (sorted([llama2.eos_token_id, end]), "")
    made = document(template, conversation("Say hi.", "Hi there."))
    assert made.end_learned and made.input_ids[made.supervised == 1][-1] == end


# Tokenizers.


@pytest.mark.parametrize("template", ["alpaca", "vicuna", "chat"])
def test_tokenizer_without_letters(template: str) -> None:
    """15: texts of its letters train; others would be dropped, and shift what follows."""
    backend = Tokenizer(models.BPE({"A": 0, "C": 1, "</s>": 2, "<s>": 3, ":": 4}, []))
    bases = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    bases.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    made = make(bases, template=template)
    text = document(made, Conversation((), text="ACCA"))
    assert text.input_ids.tolist() == [0, 1, 1, 0, 2] and text.supervised.tolist() == [
        0,
        1,
        1,
        1,
        1,
    ]
    with pytest.raises(BadRow, match="the tokenizer has no token for 'T'"):
        made.documents(Conversation((), text="ACTA"))
    if template == "chat":
        spoken = document(made, conversation("A", "CA"))
        assert spoken.input_ids.tolist() == [0, 2, 1, 0, 2]
        assert spoken.supervised.tolist() == [0, 0, 1, 1, 1]
    else:
        with pytest.raises(BadRow, match="the tokenizer has no token for"):
            made.documents(conversation("A", "CA"))


@pytest.mark.parametrize(
    ("name", "content", "package"),
    [
        ("tokenizer", b"\n\x0e\n\x05<unk>", "sentencepiece"),
        ("spiece", b"\n\x0e\n\x05<unk>", "sentencepiece"),
        ("tokenizer", b"IQ== 0\nIg== 1\n", "tiktoken"),
    ],
)
def test_tokenizer_model_alone_names_the_package_that_reads_it(
    name: str, content: bytes, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.model").write_bytes(content)
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        load.load_tokenizer(tmp_path, ModelConfig())


@pytest.mark.parametrize("name", ["gpt2", "gemma", "llama"])
def test_tokenizer_without_its_vocabulary_is_refused(name: str, tmp_path: Path) -> None:
    """Transformers makes one of special tokens alone, by the model's type, where it can."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    told = "one of: .* serialization file" if name == "llama" else "no token but special ones"
    with pytest.raises(UserError, match=told):
        load.load_tokenizer(tmp_path, ModelConfig())


def test_tokenizer_is_the_same_where_mistral_common_is_installed(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads a tekken.json beside the tokenizer's own file, and gives no places of tokens."""
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    auto = transformers.models.auto.tokenization_auto
    monkeypatch.setitem(auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    mistral = transformers.integrations.mistral.tokenizer
    monkeypatch.setattr(mistral, "resolve_mistral_format", lambda *_, **__: (True, None))
    loaded = load.load_tokenizer(tmp_path, ModelConfig())
    assert loaded.get_vocab() == tiny_tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("settings", "own", "expected"),
    [
        ({"eos_token_id": 2, "top_p": 0.9}, 3, [2, 7]),
        ({"eos_token_id": [7, 2]}, 3, [7, 2]),
        ({"top_p": 0.9}, 3, [7]),
        (None, 2, [2, 7]),
        (None, [2, 3], [2, 3, 7]),
        (None, None, [7]),
    ],
)
def test_generation_config_of_a_run_holds_the_end_of_a_turn(
    settings: dict[str, Any] | None, own: Any, expected: list[int], tmp_path: Path
) -> None:
    """Beside those that transformers would stop at: of that file, or else of the model that it has
    made of config.json, in which a wrapper's text model has them one level down."""
    file = tmp_path / "model" / "generation_config.json"
    file.parent.mkdir()
    if settings is not None:
        file.write_text(json.dumps(settings))
    keep_end_tokens([7], own, tmp_path)
    assert json.loads(file.read_text()) == {**(settings or {}), "eos_token_id": expected}
