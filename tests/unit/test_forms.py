"""Published formats of preferences, answers and verdicts, each with a few rows from its public description.

A known format is read. An unknown format is refused, with a proposed mapping that the user confirms.
"""

import io
import itertools
import json
import re

import pytest

from app.spec.datasets.check import examples, survey
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Example, Message
from app.spec.datasets.mapping import Mapping
from app.spec.json_types import JsonObject
from tests.helpers.dataset_files import assistant, user

Rows = list[JsonObject]


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def read(rows: Rows, mapping: JsonObject | None = None) -> list[Example]:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return list(examples(io.BytesIO(content), None if mapping is None else Mapping.model_validate(mapping)))


def turns_in_short(turns: str | list[Message]) -> str:
    """The text itself, or the first letter of each role with its content: u:…|a:…"""
    if isinstance(turns, str):
        return turns
    return "|".join(f"{turn['role'][0]}:{turn['content']}" for turn in turns)


def in_short(parsed: list[Example]) -> list[str]:
    """One line per example: prompt → answers, best first. A minus marks an undesirable answer."""
    lines = []
    for example in parsed:
        prompt = turns_in_short(example.conversation if example.system else example.prompt)
        sign = "" if example.desirable else "-"
        lines.append(f"{prompt} → {' > '.join(sign + turns_in_short(response) for response in example.responses)}")
    return lines


CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
ANSWERS = {"chosen": "good", "rejected": "bad"}
WHOLE_CONVERSATIONS = {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}
KNOWN_FORMATS: dict[str, tuple[Rows, list[str]]] = {
    "HH transcripts": ([{"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}], ["u:q → good > bad"]),
    "prompt, chosen, rejected": ([{"id": 1, "source": "x", "prompt": "q", **ANSWERS}], ["q → good > bad"]),
    "with a reference answer": ([{"prompt": "q", "response": "good", **ANSWERS}], ["q → good > bad"]),
    "with models and scores": ([{"prompt": "q", **ANSWERS, "chosen_model": "m", "score_chosen": 8.0, "score_rejected": 2.0}], ["q → good > bad"]),
    "system and question": ([{"system": "s", "question": "q", **ANSWERS}], ["s:s|u:q → good > bad"]),
    "system and input": ([{"system": "", "input": "q", **ANSWERS}], ["q → good > bad"]),
    "system and query": ([{"system_prompt": "s", "query": "q", **ANSWERS}], ["s:s|u:q → good > bad"]),
    "system as messages": ([{"system": [{"role": "system", "content": "s"}], "prompt": "q", **ANSWERS}], ["s:s|u:q → good > bad"]),
    "prompt text, whole conversations": ([{"prompt": "q", "prompt_id": "x", "messages": WHOLE_CONVERSATIONS["chosen"], **WHOLE_CONVERSATIONS}], ["q → good > bad"]),
    "prompt that differs in white space": ([{"prompt": " q\n", **WHOLE_CONVERSATIONS}], [" q\n → good > bad"]),
    "whole conversations": ([{"source": "x", **WHOLE_CONVERSATIONS}], ["u:q → good > bad"]),
    "whole conversations of several turns": (
        [{side: [user("q"), assistant("a"), user("r"), assistant(text)] for side, text in ANSWERS.items()}],
        ["u:q|a:a|u:r → good > bad"],
    ),
    "prompt text that begins whole conversations of several turns": (
        [{"prompt": "q", **{side: [user("q"), assistant("a"), user("r"), assistant(text)] for side, text in ANSWERS.items()}}],
        ["q → a:a|u:r|a:good > a:a|u:r|a:bad"],
    ),
    "prompt text that is the last question": (
        [{"prompt": "r", **{side: [user("q"), assistant("a"), user("r"), assistant(text)] for side, text in ANSWERS.items()}}],
        ["u:q|a:a|u:r → good > bad"],
    ),
    "messages in all three": ([{"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}], ["u:q → good > bad"]),
    "a message in each side": ([{"prompt": [user("q")], "chosen": assistant("good"), "rejected": assistant("bad")}], ["u:q → good > bad"]),
    "a system message in the sides": (
        [{"prompt": "q", **{side: [{"role": "system", "content": "s"}, user("q"), assistant(text)] for side, text in ANSWERS.items()}}],
        ["s:s|u:q → good > bad"],
    ),
    "a call, its result and an answer": (
        [{"prompt": [user("q")], "chosen": [assistant("", tool_calls=[CALL]), {"role": "tool", "content": "2"}, assistant("good")], "rejected": [assistant("bad")]}],
        ["u:q → a:|t:2|a:good > bad"],
    ),
    "a call, its result and an answer, without a prompt": (
        [{"chosen": [user("q"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "2"}, assistant("good")], "rejected": [user("q"), assistant("bad")]}],
        ["u:q → a:|t:2|a:good > bad"],
    ),
    "an implicit prompt in plain text": (
        [{"chosen": "The sky is blue.", "rejected": "The sky is green."}, {"chosen": "Q: 1+1?\nA: 2", "rejected": "Q: 1+1?\nA: 3"}],
        ["The sky is →  blue. >  green.", "Q: 1+1?\nA: →  2 >  3"],
    ),
    "OpenAI preference": (
        [{"input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True}, "preferred_output": [assistant("good")], "non_preferred_output": [assistant("bad")]}],
        ["u:q → good > bad"],
    ),
    "ShareGPT preference": ([{"conversations": [human("q")], "chosen": gpt("good"), "rejected": gpt("bad")}], ["u:q → good > bad"]),
    "Alpaca preference": ([{"instruction": "do", "input": "this", **ANSWERS}], ["do\nthis → good > bad"]),
    "stack-exchange-paired": ([{"qid": 1, "question": "q", "response_j": "good", "response_k": "bad"}], ["Question: q\n\nAnswer:  → good > bad"]),
    "safety pairs with ids": (
        [{"prompt": "q", "response_0": "bad", "response_1": "good", "is_response_0_safe": False, "better_response_id": 1, "safer_response_id": 0}],
        ["q → good > bad"],
    ),
    "human preferences by upvotes": (
        [{"history": "q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 9, "score_B": 2},
         {"history": "r", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "score_A": 2, "score_B": 9}],
        ["q → good > bad", "r → good > bad"],
    ),
    "arena battles": (
        [{"model_a": "x", "model_b": "y", "winner": winner, "conversation_a": [user("q"), assistant("one")], "conversation_b": [user("q"), assistant("two")], "turn": 1}
         for winner in ("model_a", "model_b", "tie", "tie (bothbad)")],
        ["u:q → one > two", "u:q → two > one"],
    ),
    "arena battles of several turns": (
        [{"winner": "model_b", "conversation_a": [user("q"), assistant("1"), user("r"), assistant("2")], "conversation_b": [user("q"), assistant("3"), user("r"), assistant("4")]}],
        ["u:q → a:3|u:r|a:4 > a:1|u:r|a:2"],
    ),
    "arena battles in a table": (
        [{"prompt": "q", "response_a": "bad", "response_b": "good", "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}],
        ["q → good > bad"],
    ),
    "helpfulness from -3 to 3": (
        [{"domain": "x", "context": [user("q")], "response1": "good", "response2": "bad", "overall_preference": -2}], ["u:q → good > bad"],
    ),
    "judged outputs": ([{"instruction": "q", "output_1": "bad", "output_2": "good", "preference": 2.0}], ["q → good > bad"]),
    "answers with ranks in them": (
        [{"prompt": "q", "answers": [{"answer": "b", "model": "m", "rank": 2.0}, {"answer": "a", "model": "n", "rank": 1.0}], "turns": 1}],
        ["q → a > b"],
    ),
    "responses with scores in them": (
        [{"prompt": "q", "completions": [{"text": "b", "score": 2}, {"text": "a", "score": 3}, {"text": "c", "score": 1}]}], ["q → a > b > c"],
    ),
    "UltraFeedback": (
        [{"source": "x", "instruction": "q", "models": ["m", "n"], "completions": [{"annotations": {}, "response": "b", "overall_score": 2.5, "fine-grained_score": 5}, {"annotations": {}, "response": "a", "overall_score": 7.5, "fine-grained_score": 1}]}],
        ["q → a > b"],
    ),
    "labelled": ([{"prompt": [user("q")], "completion": [assistant("good")], "label": True}, {"prompt": [user("q")], "completion": [assistant("bad")], "label": False}],
                 ["u:q → good", "u:q → -bad"]),
    "labelled by kto_tag": ([{"messages": [user("q"), assistant("bad")], "kto_tag": False}], ["u:q → -bad"]),
    "chat": ([{"prompt": "q", "prompt_id": "x", "messages": [user("q"), assistant("a"), user("r"), assistant("b")], "category": "x"}], ["u:q|a:a|u:r → b"]),
    "chat of another service": ([{"messages": [{"role": "User", "content": "q"}, {"role": "Chatbot", "content": "a"}]}], ["u:q → a"]),
    "chat with speakers": ([{"conversations": [{"speaker": "human", "text": "q"}, {"speaker": "bot", "text": "a"}]}], ["u:q → a"]),
    "ShareGPT": ([{"id": "x", "conversations": [{"from": "system", "value": "s"}, human("q"), gpt("a")]}], ["s:s|u:q → a"]),
    "ShareGPT with weights": ([{"conversations": [human("q") | {"weight": None}, gpt("a") | {"weight": 1.0}, human("r") | {"weight": None}, gpt("b") | {"weight": 0.0}]}], ["u:q → a"]),
    "chat with flags": ([{"messages": [user("q"), assistant("a", train=False), user("r"), assistant("b", train=True)]}], ["u:q|a:a|u:r → b"]),
    "chat with loss flags": ([{"messages": [user("q"), assistant("a", loss=True), user("r"), assistant("b", loss=False)]}], ["u:q → a"]),
    "ShareGPT with tools": (
        [{"conversations": [human("q"), {"from": "function_call", "value": '{"name": "add", "arguments": {}}'}, {"from": "observation", "value": "2"}, gpt("a")], "tools": '[{"name": "add"}]'}],
        ["u:q|a:|t:2 → a"],
    ),
    "Alpaca": ([{"instruction": "do", "input": "", "output": "done", "text": "Below is …"}], ["do → done"]),
    "Alpaca with history": ([{"instruction": "r", "input": "", "output": "b", "history": [["q", "a"]], "system": "s"}], ["s:s|u:q|a:a|u:r → b"]),
    "prompt and completion": ([{"prompt": "q", "completion": "a"}], ["q → a"]),
    "content in parts": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}], ["u:q → a"],
    ),
    "text": ([{"text": "once", "label": "pos"}], [" → once"]),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_FORMATS)
def test_a_known_format_is_read(name: str) -> None:
    rows, expected = KNOWN_FORMATS[name]
    assert in_short(read(rows)) == expected


UNKNOWN_FORMATS: dict[str, tuple[Rows, list[str]]] = {
    "accepted and rejected": ([{"input": "q", "accepted": "good", "rejected": "bad", "ID": 1}], ["q → good > bad"]),
    "other names of the sides": ([{"question": "q", "preferred_response": "good", "dispreferred_response": "bad"}], ["q → good > bad"]),
    "question and answer": ([{"question": "q", "answer": "a", "id": 4}], ["q → a"]),
    "instruction and response": ([{"instruction": "q", "context": "", "response": "a", "category": "x"}], ["q → a"]),
    "system prompt, question, response": ([{"id": "x", "system_prompt": "s", "question": "q", "response": "a"}], ["s:s|u:q → a"]),
    "conversation": ([{"conversation_id": "x", "model": "m", "conversation": [user("q"), assistant("a")], "turn": 1}], ["u:q → a"]),
    "Gemini's contents": ([{"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]}], ["u:q → a"]),
    "prompt and response": ([{"prompt": "q", "response": "a", "helpfulness": 4, "verbosity": 2}], ["q → a"]),
    "query and candidates": ([{"query": "q", "candidates": ["a", "b"]}], ["q → a > b"]),
    "content": ([{"url": "x", "content": "once upon"}], [" → once upon"]),
}  # fmt: skip
"""Formats that are not recognised. The proposed mapping reads each one."""


@pytest.mark.parametrize("name", UNKNOWN_FORMATS)
def test_an_unknown_format_is_refused_with_the_mapping_that_reads_it(name: str) -> None:
    rows, expected = UNKNOWN_FORMATS[name]
    with pytest.raises(DatasetError, match="no known format has these fields") as caught:
        read(rows)
    command = re.search(r"dpo files check FILE --mapping '(.+)'$", caught.value.reason)
    assert command is not None
    assert json.loads(command[1]) == caught.value.mapping
    assert in_short(read(rows, caught.value.mapping)) == expected


MAPPED_FORMATS: dict[str, tuple[Rows, JsonObject, list[str]]] = {
    "summaries in a list, and a choice": (
        [{"info": {"post": "q"}, "summaries": [{"text": "bad"}, {"text": "good"}], "choice": 1}],
        {"input": "info.post", "output_1": "summaries.0.text", "output_2": "summaries.1.text", "label": {"column": "choice", "first": [0], "second": [1]}},
        ["q → good > bad"],
    ),
    "roles with other names": (
        [{"turns": [{"role": "customer", "content": "q"}, {"role": "agent", "content": "a"}]}],
        {"messages": "turns", "roles": {"customer": "user", "agent": "assistant"}},
        ["u:q → a"],
    ),
    "roles with other names and known columns": (
        [{"messages": [{"role": "customer", "content": "q"}, {"role": "agent", "content": "a"}]}],
        {"roles": {"customer": "user", "agent": "assistant"}},
        ["u:q → a"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPPED_FORMATS)
def test_a_format_that_needs_a_mapping_is_read_with_one(name: str) -> None:
    rows, mapping, expected = MAPPED_FORMATS[name]
    with pytest.raises(DatasetError):
        read(rows)
    assert in_short(read(rows, mapping)) == expected


def test_an_unknown_role_is_refused_with_advice_to_map_it() -> None:
    with pytest.raises(DatasetError, match="a mapping's 'roles' says what other names mean") as caught:
        read([{"messages": [{"role": "customer", "content": "q"}, assistant("a")]}])
    assert caught.value.field == "messages[0].role"


def test_a_prompt_that_is_an_object_is_refused_with_advice_to_map_it() -> None:
    row = {"question": {"id": "x", "full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 1.0, "score_1": -1.0}
    with pytest.raises(DatasetError, match="a mapping can name the text in it") as caught:
        read([row])
    assert caught.value.field == "question"


def test_system_prompts_that_differ_in_white_space_always_give_the_same_one() -> None:
    system_turns = [
        {"role": "system", "content": content} for content in ("be brief", "be  brief", "be brief ", " be brief")
    ]
    for first, second in itertools.permutations(system_turns, 2):
        (example,) = read([{"prompt": "q", "chosen": [first, assistant("a")], "rejected": [second, assistant("b")]}])
        assert example.system == min(str(first["content"]), str(second["content"]))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "chosen": [user("other"), assistant("a")], "rejected": [user("other"), assistant("b")]}, "answers_another_prompt"),
        ({"prompt": "q", "chosen": [{"role": "system", "content": "s"}, assistant("a")], "rejected": [{"role": "system", "content": "t"}, assistant("b")]}, "histories_differ"),
        ({"prompt": [{"role": "system", "content": "s"}, user("q")], "chosen": [{"role": "system", "content": "t"}, user("q"), assistant("a")], "rejected": [assistant("b")]}, "histories_differ"),
        ({"chosen": [user("q"), assistant("a"), user("r"), assistant("b")], "rejected": [user("q"), assistant("c"), user("s"), assistant("d")]}, "histories_differ"),
        ({"prompt": [user("q")], "chosen": [user("q")], "rejected": [assistant("b")]}, "ends_without_an_answer"),
        ({"messages": [user("q"), {"role": "assistant", "content": None}]}, "no_answer_to_train_on"),
        ({"messages": [{"role": "user", "content": None}, assistant("a")]}, "empty_turn"),
        ({"messages": None, "tools": []}, "empty_messages"),
    ],
)  # fmt: skip
def test_a_row_that_would_lose_content_is_dropped_and_counted(record: JsonObject, reason: str) -> None:
    good = (
        {"prompt": "q", **ANSWERS}
        if "prompt" in record
        else {"messages": [user("q"), assistant("a")]}
        if "messages" in record
        else WHOLE_CONVERSATIONS
    )
    content = "".join(json.dumps(row) + "\n" for row in (good, record)).encode()
    report = survey(io.BytesIO(content))
    assert (report.error, report.kept, report.dropped) == (None, 1, {reason: 1})


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_read_from_a_field_of_any_known_name(name: str) -> None:
    answer = {"role": "assistant", "content": "a", name: "hm"}
    expected: list[Message] = [{"role": "assistant", "content": "a", "reasoning": "hm"}]
    (chat,) = read([{"messages": [user("q"), answer]}])
    (pair,) = read([{"prompt": [user("q")], "chosen": [answer], "rejected": [assistant("b")]}])
    assert chat.responses == (expected,) and pair.responses == (expected, "b")


def test_reasoning_in_parts_is_read() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]
    (example,) = read([{"messages": [user("q"), {"role": "assistant", "content": parts}]}])
    assert example.responses == ([{"role": "assistant", "content": "a", "reasoning": "hm"}],)


def test_an_implicit_prompt_ends_where_trl_ends_it() -> None:
    from trl.data_utils import maybe_extract_prompt

    pairs = [
        ("The sky is blue.", "The sky is green."),
        ("Q: a b\nA: c", "Q: a b\nA: d"),
        ("ab c", "ab  c"),
        ("abc d", "abx d"),
    ]
    for chosen, rejected in pairs:
        theirs = maybe_extract_prompt({"chosen": chosen, "rejected": rejected})
        (ours,) = read([{"chosen": chosen, "rejected": rejected}])
        assert (ours.prompt, *ours.responses) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
