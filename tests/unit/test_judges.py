"""Judges behind an endpoint: their questions, the parsing of their answers, and a server that fails."""

import time
from collections.abc import Iterator

import pytest

from app.spec.evaluation import Endpoint, Judge
from tests.helpers.judge_server import running_judge
from worker.endpoints import client
from worker.endpoints.client import Answer, EndpointClient, EndpointFailed, Question
from worker.judge import choice, questions, verdicts

SIDES = ("candidate", "baseline")
ITEM = {"prompt": "\n\nHuman: why {a}?\n\nAssistant:", "candidate": "Because {b}. ", "baseline": "No."}


def judge_with(**fields: str) -> Judge:
    return Judge.model_validate({"type": "model", "model": "judge", **fields})


def test_both_orders_are_asked_with_the_papers_prompt() -> None:
    first, second = questions(judge_with(), ITEM, SIDES)
    assert first.startswith(
        "For the following query to a chatbot, which response is more helpful?\n\nQuery: Human: why"
    )
    assert "Response A:\nBecause {b}.\n\nResponse B:\nNo.\n\nFIRST provide" in first, "braces in an answer are kept"
    assert second == first.replace("Because {b}.", "x").replace("No.", "Because {b}.").replace("x\n", "No.\n", 1)
    plain, concise = (
        questions(judge_with(question=f"{variant}_summary"), ITEM, SIDES)[0] for variant in ("plain", "concise")
    )
    assert "in the given forum post?\n" in plain and "precise and concise" in concise
    assert len({plain, concise, first}) == 3
    custom = judge_with(template="{b} or {a} to {prompt}? Preferred:")
    assert questions(custom, ITEM, SIDES)[0] == "No. or Because {b}. to Human: why {a}?\n\nAssistant:? Preferred:"
    assert questions(judge_with(), ITEM | {"baseline": "Because {b}."}, SIDES) == [], (
        "identical answers are not compared"
    )


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Comparison: A is fine, B better.\nPreferred: B", "B"),
        ('Comparison: x\nMore helpful: "A"', "A"),
        ("**Preferred:** **B**.", "B"),
        ("More helpful: Response B", "B"),
        ("Preferred: Summary A.", "A"),
        ("Comparison: B is more helpful: a direct answer.\nB", "B"),
        ("It is more helpful: a direct answer", None),
        ("preferred: TIE", "tie"),
        ("Both are good.\nB", "B"),
        ("Preferred: A\nNo, wait. Preferred: B", "B"),
        ('Preferred: <"A" or "B">', None),
        ("I prefer A because A is A", None),
        ("Preferred: both", None),
        ("Preferred: A and B", None),
        ("Preferred: A/B", None),
        ("More helpful: Response A & Response B", None),
        ("Preferred: A\nOn second thought.\nPreferred: B and A alike", None),
        ("Both help.\nA and B", None),
        ("Both help.\nPreferred: A = B", None),
        ("Preferred: B because A is vague", "B"),
        ("Preferred: B, answer A is rude", "B"),
        ("Preferred: A, A is clearer", "A"),
        ("Preferred: A\n(A or B)", "A"),
        ("Preferred: A. And B is vague.", "A"),
        ("", None),
    ],
)
def test_the_preferred_letter_is_parsed_from_an_answer(answer: str, expected: str | None) -> None:
    assert choice(answer) == expected


def test_verdicts_name_sides_and_not_letters() -> None:
    assert verdicts(["Preferred: A", "Preferred: A"], SIDES) == ["candidate", "baseline"]
    assert verdicts(["Preferred: B", None], SIDES) == ["baseline", None]
    assert verdicts(["Preferred: tie", "?"], SIDES) == ["tie", None]
    assert verdicts([], SIDES) == ["tie", "tie"]


QUESTIONS = [questions(judge_with(), ITEM | {"candidate": "word " * (k + 1)}, SIDES)[k % 2] for k in range(40)]


class AnswerStore:
    """The answers that the client handed over, and in how many batches."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.batches = 0

    def keep(self, fresh: dict[str, Answer]) -> None:
        assert not self.answers.keys() & fresh.keys()
        self.answers |= fresh
        self.batches += 1


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_WAIT_SECONDS", 0.05)


def key_of(question: str) -> str:
    return Question.of_text(question).key


def asked() -> Iterator[Question]:
    return map(Question.of_text, QUESTIONS)


def judge_client(spec: Endpoint, key: str | None = None) -> EndpointClient:
    return EndpointClient(spec, key, ("localhost:*",), "judge")


def ask(url: str, known: dict[str, Answer] | None = None, key: str | None = None, **fields: object) -> AnswerStore:
    store = AnswerStore()
    spec = Endpoint.model_validate({"base_url": url, "model": "judge", **fields})
    answers = judge_client(spec, key).ask_all(asked(), known or {}, store.keep, lambda: None)
    assert answers == (known or {}) | store.answers and answers.keys() == {key_of(question) for question in QUESTIONS}
    return store


@pytest.mark.parametrize(
    "faults",
    [
        (),
        ("rate limit", "rate limit", "error"),
        ("not json", "no choices", "half", "hang up"),
        ("error",) * 5,
    ],
)
def test_each_question_is_answered_once_despite_faults(faults: tuple[str, ...]) -> None:
    with running_judge(faults=faults) as server:
        store = ask(server.url, concurrency=4)
        assert server.answered == dict.fromkeys(QUESTIONS, 1) and store.batches >= 1
        assert set(server.requests.values()) == {len(faults) + 1}
        assert server.max_in_flight <= 4
        assert server.bodies[0]["model"] == "judge" and server.bodies[0]["temperature"] == 0
    for number, question in enumerate(QUESTIONS):
        answer = store.answers[key_of(question)]
        assert choice(answer.text or "") == ("B" if number % 2 else "A") and answer.input_tokens == len(
            question.split()
        )


def test_a_question_that_always_fails_stays_unanswered_while_others_are_answered() -> None:
    """One failing question must not waste the answers to the others, which were paid for."""
    failing = QUESTIONS[3]
    with running_judge(faults=("error",) * 1000, only=failing) as server:
        server.delay = 0.05  # per answer; a failed question waits at most as long for its retry
        store = ask(server.url, concurrency=2)
        assert server.requests[failing] >= client.MAX_FAILED and failing not in server.answered
    assert [question for question in QUESTIONS if store.answers[key_of(question)].text is None] == [failing]


def test_the_last_failing_question_is_given_up_but_a_dead_judge_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 0.3)
    with running_judge(faults=("error",) * 1000, only=QUESTIONS[3]) as server:
        store = ask(server.url, concurrency=1)
        assert [
            number for number, question in enumerate(QUESTIONS) if store.answers[key_of(question)].text is None
        ] == [3]
    with running_judge(faults=("error",) * 1000) as server, pytest.raises(EndpointFailed, match="no answer for"):
        ask(server.url, ONE_KNOWN, concurrency=1)


def test_answers_that_arrive_along_with_a_refusal_are_kept() -> None:
    with running_judge() as server:
        server.delay, server.credit, store = 0.02, 20, AnswerStore()
        spec = Endpoint.model_validate({"base_url": server.url, "model": "judge", "concurrency": 8})
        with pytest.raises(EndpointFailed, match="402"):
            judge_client(spec).ask_all(asked(), {}, store.keep, lambda: None)
        assert store.answers.keys() == {key_of(question) for question in server.answered}


def test_known_refusals_do_not_count_as_answers() -> None:
    known = {key_of(question): Answer(None) for question in QUESTIONS[:9]}
    with running_judge(faults=("refuse",)) as server, pytest.raises(EndpointFailed, match="answered 400"):
        ask(server.url, known)


@pytest.mark.parametrize("text", ["-" * 200_000, "Preferred" + ":" * 200_000, "Preferred: " + "response " * 50_000])
def test_a_pathological_answer_is_parsed_at_once(text: str) -> None:
    """A pattern that backtracks would take days here."""
    assert choice(text) is None
    assert choice(f"{text}\nPreferred: B") == "B"


def test_the_end_of_a_long_answer_is_kept() -> None:
    with running_judge(lambda *_: "thinking " * 100_000 + "\nPreferred: A") as server:
        store = ask(server.url)
    assert {choice(answer.text or "") for answer in store.answers.values()} == {"A"}
    assert all(len(answer.text or "") <= client.MAX_VERDICT_CHARACTERS for answer in store.answers.values())


def test_a_known_answer_is_not_asked_for_again() -> None:
    known = {key_of(question): Answer("Preferred: A", 3, 4) for question in QUESTIONS[:15]}
    with running_judge() as server:
        ask(server.url, known)
        assert not server.requests.keys() & set(QUESTIONS[:15]) and len(server.requests) == 25


ONE_KNOWN = {key_of(QUESTIONS[0]): Answer("Preferred: A")}


def test_invalid_responses_are_no_answer_but_an_unparseable_text_is_one() -> None:
    with running_judge(faults=("not json",) * 5) as server:
        assert {answer.text for answer in ask(server.url, ONE_KNOWN).answers.values()} == {None}
        with pytest.raises(EndpointFailed, match="answered nothing"):
            server.requests.clear()
            ask(server.url)  # no question was ever answered
    with running_judge(faults=("babble",)) as server:
        assert {answer.text for answer in ask(server.url).answers.values()} == {"no words"}
        assert set(server.requests.values()) == {1}, "a paid answer is not asked for again"


def test_a_refusal_fails_only_its_question_if_another_was_answered() -> None:
    with running_judge(faults=("refuse",)) as server:
        assert {answer.text for answer in ask(server.url, ONE_KNOWN).answers.values()} == {None}, (
            "the known answer shows that the judge works"
        )
        server.requests.clear()
        with pytest.raises(EndpointFailed, match="answered 400: I will not talk about this"):
            ask(server.url)  # only refusals: the request itself is at fault
        server.requests.clear()
        server.faults = ("no credit",)
        with pytest.raises(EndpointFailed, match="402"):
            ask(server.url, ONE_KNOWN)


def test_a_wrong_key_fails_at_once_and_is_not_shown() -> None:
    with running_judge(key="right-key") as server:
        ask(server.url, key="right-key")
        with pytest.raises(EndpointFailed, match="401") as raised:
            ask(server.url, key="wrong-key")
    assert raised.value.code == "judge_refused" and "wrong-key" not in str(raised.value)


def test_an_unreachable_judge_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 0.3)
    with running_judge() as server:
        url = server.url
    with pytest.raises(EndpointFailed, match="no answer for") as raised:
        ask(url)
    assert raised.value.code == "judge_unavailable"


def test_a_judge_on_a_private_host_is_refused_unless_the_operator_allows_it() -> None:
    spec = Endpoint(base_url="http://localhost:1/v1", model="judge")
    with pytest.raises(EndpointFailed, match="https"):
        EndpointClient(spec, None, (), "judge").ask_all(asked(), {}, AnswerStore().keep, lambda: None)


def test_answers_in_flight_are_kept_when_the_run_is_cancelled() -> None:
    class Cancelled(Exception):
        pass

    with running_judge() as server:
        server.delay, store = 0.3, AnswerStore()

        def stop_after_an_answer() -> None:
            if server.answered:
                raise Cancelled

        spec = Endpoint(base_url=server.url, model="judge", concurrency=4)
        with pytest.raises(Cancelled):
            judge_client(spec).ask_all(asked(), {}, store.keep, stop_after_an_answer)
        began = time.monotonic()
        assert store.answers.keys() == {key_of(question) for question in server.answered} and len(store.answers) <= 8
        server.delay = 0.0
        ask(server.url, store.answers)
        assert set(server.answered.values()) == {1} and time.monotonic() - began < 60
