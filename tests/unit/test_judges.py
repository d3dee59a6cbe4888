"""Judges that are asked: the paper's words, what their answers say, and a server that does not always answer."""

import time

import pytest

from app.spec.evaluation import Endpoint, Judge
from tests.helpers.judge_server import judging
from worker.judges import endpoint
from worker.judges.endpoint import Answer, JudgeClient, JudgeFailed, key_of
from worker.judges.questions import choice, questions, verdicts

SIDES = ("candidate", "baseline")
ITEM = {"prompt": "\n\nHuman: why {a}?\n\nAssistant:", "candidate": "Because {b}. ", "baseline": "No."}


def asked_by(**fields: str) -> Judge:
    return Judge.model_validate({"type": "model", "model": "judge", **fields})


def test_both_orders_are_asked_in_the_papers_words() -> None:
    first, second = questions(asked_by(), ITEM, SIDES)
    assert first.startswith(
        "For the following query to a chatbot, which response is more helpful?\n\nQuery: Human: why"
    )
    assert "Response A:\nBecause {b}.\n\nResponse B:\nNo.\n\nFIRST provide" in first, "braces of an answer stay"
    assert second == first.replace("Because {b}.", "x").replace("No.", "Because {b}.").replace("x\n", "No.\n", 1)
    plain, concise = (questions(asked_by(question=f"{k}_summary"), ITEM, SIDES)[0] for k in ("plain", "concise"))
    assert "in the given forum post?\n" in plain and "precise and concise" in concise
    assert len({plain, concise, first}) == 3
    own = asked_by(template="{b} or {a} to {prompt}? Preferred:")
    assert questions(own, ITEM, SIDES)[0] == "No. or Because {b}. to Human: why {a}?\n\nAssistant:? Preferred:"
    assert questions(asked_by(), ITEM | {"baseline": "Because {b}."}, SIDES) == [], "they say the same"


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
def test_an_answer_says_which(answer: str, expected: str | None) -> None:
    assert choice(answer) == expected


def test_verdicts_are_about_sides_not_letters() -> None:
    assert verdicts(["Preferred: A", "Preferred: A"], SIDES) == ["candidate", "baseline"]
    assert verdicts(["Preferred: B", None], SIDES) == ["baseline", None]
    assert verdicts(["Preferred: tie", "?"], SIDES) == ["tie", None]
    assert verdicts([], SIDES) == ["tie", "tie"]


QUESTIONS = [questions(asked_by(), ITEM | {"candidate": "word " * (k + 1)}, SIDES)[k % 2] for k in range(40)]


class Asked:
    """What an asking kept, part by part."""

    def __init__(self) -> None:
        self.kept: dict[str, Answer] = {}
        self.parts = 0

    def keep(self, fresh: dict[str, Answer]) -> None:
        assert not self.kept.keys() & fresh.keys()
        self.kept |= fresh
        self.parts += 1


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_WAIT_SECONDS", 0.05)


def ask(url: str, known: dict[str, Answer] | None = None, key: str | None = None, **fields: object) -> Asked:
    asked = Asked()
    given = Endpoint.model_validate({"base_url": url, "model": "judge", **fields})
    found = JudgeClient(given, key, ("localhost",)).ask_all(iter(QUESTIONS), known or {}, asked.keep, lambda: None)
    assert found == (known or {}) | asked.kept and found.keys() == {key_of(question) for question in QUESTIONS}
    return asked


@pytest.mark.parametrize(
    "faults",
    [
        (),
        ("rate limit", "rate limit", "error"),
        ("not json", "no choices", "half", "hang up"),
        ("error",) * 5,
    ],
)
def test_each_question_is_answered_once_whatever_happens_before(faults: tuple[str, ...]) -> None:
    with judging(faults=faults) as server:
        found = ask(server.url, concurrency=4)
        assert {question: server.prefers(question, "", "") for question in QUESTIONS} and found.parts >= 1
        assert set(server.answered.values()) == {1} and set(server.asked.values()) == {len(faults) + 1}
        assert server.most_at_once <= 4
        assert server.bodies[0]["model"] == "judge" and server.bodies[0]["temperature"] == 0
    for place, question in enumerate(QUESTIONS):
        answer = found.kept[key_of(question)]
        assert choice(answer.text or "") == ("B" if place % 2 else "A") and answer.input_tokens == len(question.split())


def test_a_question_that_fails_while_others_are_answered_stays_without_an_answer() -> None:
    """One that the server cannot bear must not throw away what the others cost."""
    cursed = QUESTIONS[3]
    with judging(faults=("error",) * 1000, only=cursed) as server:
        server.delay = 0.05  # of an answer; a question that failed waits as long at the most
        found = ask(server.url, concurrency=2)
        assert server.asked[cursed] >= endpoint.MAX_FAILED and cursed not in server.answered
    assert [question for question in QUESTIONS if found.kept[key_of(question)].text is None] == [cursed]


def test_a_question_that_is_left_alone_and_fails_is_given_up_but_a_dead_judge_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint, "PATIENCE_SECONDS", 0.3)
    with judging(faults=("error",) * 1000, only=QUESTIONS[3]) as server:
        found = ask(server.url, concurrency=1)
        assert [k for k, one in enumerate(QUESTIONS) if found.kept[key_of(one)].text is None] == [3]
    with judging(faults=("error",) * 1000) as server, pytest.raises(JudgeFailed, match="no answer for"):
        ask(server.url, ONE_KNOWN, concurrency=1)


def test_answers_that_come_with_a_refusal_are_kept() -> None:
    with judging() as server:
        server.delay, server.credit, asked = 0.02, 20, Asked()
        given = Endpoint.model_validate({"base_url": server.url, "model": "judge", "concurrency": 8})
        with pytest.raises(JudgeFailed, match="402"):
            JudgeClient(given, None, ("localhost",)).ask_all(iter(QUESTIONS), {}, asked.keep, lambda: None)
        assert asked.kept.keys() == {key_of(question) for question in server.answered}


def test_refusals_that_are_known_answer_nothing() -> None:
    known = {key_of(question): Answer(None) for question in QUESTIONS[:9]}
    with judging(faults=("refuse",)) as server, pytest.raises(JudgeFailed, match="answered 400"):
        ask(server.url, known)


@pytest.mark.parametrize("text", ["-" * 200_000, "Preferred" + ":" * 200_000, "Preferred: " + "response " * 50_000])
def test_no_answer_keeps_the_worker_matching(text: str) -> None:
    """Patterns that backtrack would take days here."""
    assert choice(text) is None
    assert choice(f"{text}\nPreferred: B") == "B"


def test_of_a_long_answer_the_end_is_kept() -> None:
    with judging(lambda *_: "thinking " * 100_000 + "\nPreferred: A") as server:
        found = ask(server.url)
    assert {choice(answer.text or "") for answer in found.kept.values()} == {"A"}
    assert all(len(answer.text or "") <= endpoint.MAX_ANSWER_CHARACTERS for answer in found.kept.values())


def test_what_is_known_is_not_asked_again() -> None:
    known = {key_of(question): Answer("Preferred: A", 3, 4) for question in QUESTIONS[:15]}
    with judging() as server:
        ask(server.url, known)
        assert not server.asked.keys() & set(QUESTIONS[:15]) and len(server.asked) == 25


ONE_KNOWN = {key_of(QUESTIONS[0]): Answer("Preferred: A")}


def test_garbage_without_end_is_no_answer_and_babble_is_one() -> None:
    with judging(faults=("not json",) * 5) as server:
        assert {answer.text for answer in ask(server.url, ONE_KNOWN).kept.values()} == {None}
        with pytest.raises(JudgeFailed, match="answered nothing"):
            server.asked.clear()
            ask(server.url)  # nobody who would ever answer
    with judging(faults=("babble",)) as server:
        assert {answer.text for answer in ask(server.url).kept.values()} == {"no words"}
        assert set(server.asked.values()) == {1}, "it was paid for"


def test_a_refusal_of_one_question_is_its_own() -> None:
    with judging(faults=("refuse",)) as server:
        assert {answer.text for answer in ask(server.url, ONE_KNOWN).kept.values()} == {None}, "as before the restart"
        server.asked.clear()
        with pytest.raises(JudgeFailed, match="answered 400: I will not talk about this"):
            ask(server.url)  # nothing but refusals: it is how we ask
        server.asked.clear()
        server.faults = ("no credit",)
        with pytest.raises(JudgeFailed, match="402"):
            ask(server.url, ONE_KNOWN)


def test_a_wrong_key_fails_at_once_and_is_not_repeated() -> None:
    with judging(key="right-key") as server:
        ask(server.url, key="right-key")
        with pytest.raises(JudgeFailed, match="401") as raised:
            ask(server.url, key="wrong-key")
    assert raised.value.code == "judge_refused" and "wrong-key" not in str(raised.value)


def test_a_judge_that_is_not_there_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PATIENCE_SECONDS", 0.3)
    with judging() as server:
        url = server.url
    with pytest.raises(JudgeFailed, match="no answer for") as raised:
        ask(url)
    assert raised.value.code == "judge_unavailable"


def test_what_is_inside_is_not_asked_unless_the_operator_says_so() -> None:
    given = Endpoint(base_url="http://localhost:1/v1", model="judge")
    with pytest.raises(JudgeFailed, match="https"):
        JudgeClient(given, None, ()).ask_all(iter(QUESTIONS), {}, Asked().keep, lambda: None)


def test_what_was_under_way_when_it_is_broken_off_is_kept() -> None:
    class Stop(Exception):
        pass

    with judging() as server:
        server.delay, asked = 0.3, Asked()

        def tick() -> None:
            if server.answered:
                raise Stop

        given = Endpoint(base_url=server.url, model="judge", concurrency=4)
        with pytest.raises(Stop):
            JudgeClient(given, None, ("localhost",)).ask_all(iter(QUESTIONS), {}, asked.keep, tick)
        began = time.monotonic()
        assert asked.kept.keys() == {key_of(question) for question in server.answered} and len(asked.kept) <= 8
        server.delay = 0.0
        ask(server.url, asked.kept)
        assert set(server.answered.values()) == {1} and time.monotonic() - began < 60
