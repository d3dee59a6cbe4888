"""From text to token rows, compared with the tokenizer's own tokens of the whole text."""

from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.spec.datasets.example import Example, Kind, Message
from tests.helpers.tiny_model import CHATML, CHATML_WITH_BOS, CORPUS, make_tokenizer
from worker.trainer.data import Recipe, Row, Tally, rows
from worker.trainer.errors import UserError
from worker.trainer.packing import Segment, tree_pack, trees

PLAIN = make_tokenizer()
BOS, EOS = PLAIN.bos_token_id, PLAIN.eos_token_id
LONG = 10_000
CONVERSATION: list[Message] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is the answer?"},
    {"role": "assistant", "content": "which"},
    {"role": "user", "content": "the other"},
]


def recipe(max_length: int = LONG, loss_on: Any = "answers") -> Recipe:
    """Examples stay as they are, since RANKED takes any number of responses."""
    return Recipe(Kind.RANKED, max_length, loss_on)


def tokenise(example: Example, tokenizer: Any = PLAIN, max_length: int = LONG, loss_on: str = "answers") -> list[Row]:
    return list(rows([example], tokenizer, recipe(max_length, loss_on), Tally()))


def tokenise_one(example: Example, tokenizer: Any = PLAIN) -> Row:
    (row,) = tokenise(example, tokenizer)
    return row


def full_ids(row: Row, k: int = 0) -> list[int]:
    return list(row.prompt + row.responses[k].ids)


def decode(ids: list[int] | tuple[int, ...], tokenizer: Any = PLAIN) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def ids_of(text: str, tokenizer: Any = PLAIN) -> list[int]:
    """The tokens of `text`, with what the tokenizer adds by itself."""
    return list(tokenizer(text).input_ids)


def test_a_pair_has_the_tokens_of_its_whole_texts() -> None:
    row = tokenise_one(Example(7, "What is it?", (" the cat.", " a dog, then.")))
    assert row.line == 7
    assert full_ids(row, 0) == ids_of("What is it? the cat.</s>")
    assert full_ids(row, 1) == ids_of("What is it? a dog, then.</s>")
    assert list(row.prompt) == ids_of("What is it?")
    assert all(all(response.scored) for response in row.responses)


def test_a_prompt_of_multibyte_characters_ends_after_its_last_character() -> None:
    row = tokenise_one(Example(1, "naïve 日本 🙂", ("🙃 été", "🙂")))
    assert decode(row.prompt) == "<s>naïve 日本 🙂"
    assert [decode(response.ids) for response in row.responses] == ["🙃 été</s>", "🙂</s>"]
    assert all(all(response.scored) for response in row.responses)


def test_a_token_over_the_boundary_is_scored_and_belongs_to_the_answer() -> None:
    row = tokenise_one(Example(1, "see t", ("he cat",)))
    assert full_ids(row) == ids_of("see the cat</s>")
    assert decode(row.prompt) == "<s>see"
    assert decode(row.responses[0].ids) == " the cat</s>"
    assert row.responses[0].ids[0] == PLAIN.convert_tokens_to_ids("Ġthe")
    assert all(row.responses[0].scored)


def test_the_end_of_a_prompt_after_the_common_prefix_is_context_that_is_not_scored() -> None:
    row = tokenise_one(Example(1, "see t", ("he cat", "!")))
    merged, unmerged = row.responses
    assert decode(row.prompt) == "<s>see"
    assert decode(merged.ids) == " the cat</s>"
    assert all(merged.scored)
    # The other answer does not merge: the prompt's " t" is in front of it and is not scored.
    assert decode(unmerged.ids) == " t!</s>"
    remainder = [decode([token]) for token, scored in zip(unmerged.ids, unmerged.scored, strict=True) if not scored]
    assert "".join(remainder) == " t"
    assert full_ids(row, 1) == ids_of("see t!</s>")


def test_the_prompt_ends_at_its_last_character_even_if_the_answers_begin_alike() -> None:
    row = tokenise_one(Example(1, "see", (" the cat", " the dog")))
    assert decode(row.prompt) == "<s>see"
    assert [decode(response.ids) for response in row.responses] == [" the cat</s>", " the dog</s>"]
    assert all(all(response.scored) for response in row.responses)


def test_both_answers_may_merge_with_the_prompt() -> None:
    row = tokenise_one(Example(1, "see t", ("he cat", "he dog")))
    assert decode(row.prompt) == "<s>see"
    assert [decode(response.ids) for response in row.responses] == [" the cat</s>", " the dog</s>"]
    assert all(all(response.scored) for response in row.responses)


texts = st.text("abcdehot .\n", max_size=12)


@given(texts, st.lists(texts.filter(bool), min_size=1, max_size=3))
@settings(deadline=None, max_examples=150)
def test_every_answer_is_whole_and_scored_exactly_where_it_has_a_character(prompt: str, answers: list[str]) -> None:
    row = tokenise_one(Example(1, prompt, tuple(answers)))
    assert f"<s>{prompt}".startswith(decode(row.prompt))
    for k, answer in enumerate(answers):
        ids, scored = full_ids(row, k), [False] * len(row.prompt) + list(row.responses[k].scored)
        assert ids == ids_of(f"{prompt}{answer}</s>")
        assert decode(ids) == f"<s>{prompt}{answer}</s>"
        assert (ids.count(BOS), ids[0], ids[-1]) == (1, BOS, EOS)
        ends = [len(decode(ids[: i + 1])) for i in range(len(ids))]
        assert scored == [end > len(f"<s>{prompt}") for end in ends]
    distinct_counts = [
        len(set(column)) for column in zip(*(full_ids(row, k) for k in range(len(answers))), strict=False)
    ]
    ends_inside = sum(len(decode(full_ids(row)[: i + 1])) <= len(f"<s>{prompt}") for i in range(len(full_ids(row))))
    common = next((i for i, distinct in enumerate(distinct_counts) if distinct > 1), len(distinct_counts))
    assert len(row.prompt) == min(common, ends_inside)


def test_a_text_that_brings_its_own_bos_gets_no_second_one() -> None:
    row = tokenise_one(Example(1, "<s>see", (" the cat",)))
    assert full_ids(row).count(BOS) == 1
    assert decode(full_ids(row)) == "<s>see the cat</s>"


def test_a_row_has_no_bos_if_the_tokenizer_adds_none() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    assert BOS not in tokenizer("see").input_ids
    row = tokenise_one(Example(1, "see", (" the cat",)), tokenizer)
    assert decode(full_ids(row)) == "see the cat</s>"


def test_a_conversation_without_a_template_is_a_transcript() -> None:
    row = tokenise_one(Example(1, CONVERSATION, ("the cat",)))
    prompt = "be brief\n\nHuman: what is the answer?\n\nAssistant: which\n\nHuman: the other\n\nAssistant:"
    assert decode(row.prompt) == f"<s>{prompt}"
    assert decode(row.responses[0].ids) == " the cat</s>"
    assert all(row.responses[0].scored)


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BOS], ids=["without BOS", "with BOS"])
@pytest.mark.parametrize("prompt", ["what is the answer?", CONVERSATION], ids=["text", "conversation"])
def test_a_chat_template_is_used_as_transformers_uses_it(template: str, prompt: str | list[Message]) -> None:
    tokenizer = make_tokenizer(template)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    row = tokenise_one(Example(1, prompt, ("the cat", "a dog")), tokenizer)
    for k, answer in enumerate(("the cat", "a dog")):
        conversation = [*turns, {"role": "assistant", "content": answer}]
        assert full_ids(row, k) == tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
        assert full_ids(row, k).count(BOS) == (1 if template == CHATML_WITH_BOS else 0)
        assert decode(row.responses[k].ids) == f"{answer}</s>\n"
        assert all(row.responses[k].scored)
    generating = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert list(row.prompt) == generating


def test_without_thoughts_the_block_that_the_template_opens_for_them_is_left_out() -> None:
    thinking = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"
    row = tokenise_one(Example(1, "what?", ("the cat",)), make_tokenizer(thinking))
    assert decode(row.prompt) == "<|user|>\nwhat?</s>\n<|assistant|>\n"
    assert decode(row.responses[0].ids) == "the cat</s>\n"


def test_a_conversation_that_the_template_refuses_is_a_user_error_with_its_line() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"Line 4: .*no system here") as caught:
        tokenise(Example(4, CONVERSATION, ("the cat",)), make_tokenizer(template))
    assert caught.value.code == "chat_template_error"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(messages[0]) }}",
    ],
)
def test_a_models_template_runs_in_a_sandbox(attack: str) -> None:
    """Templates come with base models. One that reaches beyond its messages fails the job."""
    with pytest.raises(UserError, match=r"unsafe|undefined|immutable|SecurityError") as caught:
        tokenise(Example(1, CONVERSATION, ("the cat",)), make_tokenizer(attack + CHATML))
    assert caught.value.code == "chat_template_error"


def test_loss_on_text_scores_every_token_but_the_first() -> None:
    (row,) = tokenise(Example(1, "see", (" the cat",)), loss_on="text")
    pack = tree_pack([Segment(tuple(trees([row], [0], LONG)))])
    assert full_ids(row) == ids_of("see the cat</s>")
    assert pack.targets.tolist() == ids_of("see the cat</s>")[1:]
    assert pack.predictors.tolist() == list(range(len(full_ids(row)) - 1))


def test_raw_text_is_cut_into_pieces_and_loses_nothing() -> None:
    text = " ".join(CORPUS)
    pieces = tokenise(Example(1, "", (text,), raw=True), max_length=16)
    assert len(pieces) > 3
    assert all(0 < len(full_ids(piece)) <= 16 for piece in pieces)
    assert list(chain.from_iterable(map(full_ids, pieces))) == ids_of(f"{text}</s>")


def test_raw_text_is_not_wrapped_by_a_chat_template() -> None:
    tokenizer = make_tokenizer(CHATML)
    (row,) = tokenise(Example(1, "", ("the cat",), raw=True), tokenizer)
    assert decode(full_ids(row)) == "<s>the cat</s>"
    assert row.responses[0].scored == (False, True, True, True)  # nothing predicts BOS


def test_truncation_cuts_the_prompt_from_the_left_and_keeps_the_answers() -> None:
    tally = Tally()
    prompt, answers = CORPUS[0] + "?", (" the cat.", " then the other dog!")
    full = tokenise_one(Example(1, prompt, answers))
    (row,) = rows([Example(1, prompt, answers)], PLAIN, recipe(16), tally)
    assert row.responses == full.responses
    room = 16 - max(len(response.ids) for response in full.responses)
    assert row.prompt == (BOS, *full.prompt[-(room - 1) :])
    assert (tally.prompts, tally.answers) == (1, 0)


def test_a_prompt_that_needs_less_than_half_of_the_room_is_not_cut_for_a_long_answer() -> None:
    tally = Tally()
    full = tokenise_one(Example(1, "see the dog?", (" " + CORPUS[0], " the cat.")))
    (row,) = rows([Example(1, "see the dog?", (" " + CORPUS[0], " the cat."))], PLAIN, recipe(16), tally)
    assert row.prompt == full.prompt and len(row.prompt) < 8
    assert row.responses[0].ids == full.responses[0].ids[: 16 - len(full.prompt)]
    assert row.responses[1] == full.responses[1]
    assert (tally.prompts, tally.answers, tally.rows) == (0, 1, 1)


@given(st.lists(st.sampled_from(CORPUS[0].split()), max_size=30), st.lists(st.sampled_from(CORPUS[1].split())))
@settings(deadline=None, max_examples=60)
def test_no_row_is_longer_than_max_length(prompt: list[str], answer: list[str]) -> None:
    example = Example(1, " ".join(prompt), (" ".join(answer) + "!", " no"))
    full = tokenise_one(example)
    tally = Tally()
    (row,) = rows([example], PLAIN, recipe(16), tally)
    assert all(len(full_ids(row, k)) <= 16 for k in range(2))
    assert (row == full) == (tally == Tally()) == all(len(full_ids(full, k)) <= 16 for k in range(2))


def test_many_examples_keep_their_order() -> None:
    examples = [Example(line, f"{line}?", (f" {line}.",)) for line in range(1, 601)]
    token_rows = list(rows(examples, PLAIN, recipe(), Tally()))
    assert [row.line for row in token_rows] == list(range(1, 601))
    assert [decode(full_ids(row)) for row in token_rows] == [f"<s>{number}? {number}.</s>" for number in range(1, 601)]


TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m['role'] }}\n{{ m['content'] }}{% for call in m['tool_calls'] or [] %}CALL {{ call.function.name }} "
    "{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}],
}
LOOK = ({"type": "function", "function": {"name": "look", "parameters": {}}},)


def scored_text(row: Row, tokenizer: Any) -> str:
    (response,) = row.responses
    return decode([token for token, flag in zip(response.ids, response.scored, strict=True) if flag], tokenizer)


def test_a_tool_call_is_learned_as_the_template_writes_it() -> None:
    tokenizer = make_tokenizer(TOOLS)
    row = tokenise_one(Example(1, CONVERSATION, ([CALL],), tools=LOOK), tokenizer)
    assert scored_text(row, tokenizer).startswith('CALL look {"at": "cat"}')
    expected = tokenizer.apply_chat_template([*CONVERSATION, CALL], tools=list(LOOK), tokenize=False)
    assert decode(full_ids(row), tokenizer) == expected


@pytest.mark.parametrize("tokenizer", [PLAIN, make_tokenizer(CHATML)])
def test_tools_are_refused_if_the_template_does_not_write_them(tokenizer: Any) -> None:
    for example in (Example(5, "q", ("a",), tools=LOOK), Example(5, [CONVERSATION[1]], ([CALL],))):
        with pytest.raises(UserError, match=r"Line 5: .*tools") as caught:
            tokenise_one(example, tokenizer)
        assert caught.value.param == "model"


@pytest.mark.parametrize("template", [None, CHATML])
def test_turns_with_a_weight_are_learned_beside_the_answer(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    turns: list[Message] = [
        *CONVERSATION,
        {"role": "assistant", "content": "never"},
        {"role": "user", "content": "why"},
    ]
    learned = scored_text(tokenise_one(Example(1, turns, ("because",), turns=(2,)), tokenizer), tokenizer)
    assert "which" in learned and "because" in learned
    assert "never" not in learned and "why" not in learned
    every = scored_text(tokenise(Example(1, turns, ("because",)), tokenizer, loss_on="turns")[0], tokenizer)
    assert "which" in every and "never" in every
