"""A sample row of every format of datasets. A test checks that each is recognised as its format."""

import json

from app.spec.json_types import JsonObject

_ASK = "Where is the fox?"
_GOOD, _BAD = "In the barn.", "I do not know."
_USER = {"role": "user", "content": _ASK}


def _answer(text: str) -> JsonObject:
    return {"role": "assistant", "content": text}


SAMPLES: dict[str, JsonObject] = {
    "preference": {"prompt": _ASK, "chosen": _GOOD, "rejected": _BAD},
    "openai_preference": {
        "input": {"messages": [_USER]},
        "preferred_output": [_answer(_GOOD)],
        "non_preferred_output": [_answer(_BAD)],
    },
    "sharegpt_preference": {
        "conversations": [{"from": "human", "value": _ASK}],
        "chosen": {"from": "gpt", "value": _GOOD},
        "rejected": {"from": "gpt", "value": _BAD},
    },
    "alpaca_preference": {"instruction": "Answer.", "input": _ASK, "chosen": _GOOD, "rejected": _BAD},
    "transcripts": {
        "chosen": f"\n\nHuman: {_ASK}\n\nAssistant: {_GOOD}",
        "rejected": f"\n\nHuman: {_ASK}\n\nAssistant: {_BAD}",
    },
    "implicit_prompt": {"chosen": "The fox is in the barn.", "rejected": "The fox is in the sea."},
    "stack_exchange_paired": {"question": _ASK, "response_j": _GOOD, "response_k": _BAD},
    "label_studio": {
        "data": {"prompt": _ASK, "answer1": _GOOD, "answer2": _BAD},
        "annotations": [
            {"result": [{"type": "pairwise", "value": {"selected": "left"}, "to_name": ["answer1", "answer2"]}]}
        ],
    },
    "argilla": {
        "prompt": _ASK,
        "response_1": _BAD,
        "response_2": _GOOD,
        "ranking.responses": [["response_2", "response_1"]],
        "ranking.responses.status": ["submitted"],
    },
    "judged": {"prompt": _ASK, "response_a": _GOOD, "response_b": _BAD, "winner": "response_a"},
    "ranked": {"prompt": _ASK, "responses": [_GOOD, "In the house.", _BAD]},
    "ultrafeedback": {
        "instruction": _ASK,
        "completions": [{"response": _GOOD, "overall_score": 9.0}, {"response": _BAD, "overall_score": 2.0}],
    },
    "labelled": {"prompt": _ASK, "completion": _GOOD, "label": True},
    "labelled_chat": {"messages": [_USER, _answer(_GOOD)], "label": True},
    "sharegpt_labelled": {
        "conversations": [{"from": "human", "value": _ASK}, {"from": "gpt", "value": _GOOD}],
        "label": True,
    },
    "alpaca_labelled": {"instruction": "Answer.", "input": _ASK, "output": _GOOD, "label": True},
    "openai_chat": {"messages": [{"role": "system", "content": "You know the farm."}, _USER, _answer(_GOOD)]},
    "sharegpt": {"conversations": [{"from": "human", "value": _ASK}, {"from": "gpt", "value": _GOOD}]},
    "alpaca": {"instruction": "Answer.", "input": _ASK, "output": _GOOD},
    "prompt_completion": {"prompt": _ASK, "completion": _GOOD},
    "text": {"text": "The fox lives in the barn."},
    "openai_prompts": {"messages": [_USER], "answer": "straw"},
    "prompts": {"prompt": _ASK},
}
"""A row of each format, by the name that the report shows."""


def samples() -> str:
    """One row of each format, as Markdown."""
    lines = [f"`{name}`:\n\n<!-- json: rows -->\n```json\n{json.dumps(row)}\n```" for name, row in SAMPLES.items()]
    return "\n" + "\n\n".join(lines) + "\n\n"


PARTS = {"samples of formats": samples}
