"""The questions of an attempt to one endpoint. No answer is paid for twice: not by later attempts, nor after a failure.

- Answers are kept in parts, in the folder of the job. Later attempts of the job read them.
- The answers of a job that fails are kept for the project. The next job that asks this server the same uses them.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import counted_objects
from app.spec.evaluation import Endpoint
from app.spec.json_types import JsonObject
from worker.endpoints.client import CODES, Answer, EndpointClient, EndpointFailed, Question, Role

if TYPE_CHECKING:
    from worker.sides_attempt import SidesAttempt


class Asking:
    """Asks `endpoint` for `attempt`. `name` begins the names of its parts."""

    def __init__(self, attempt: "SidesAttempt[Any]", endpoint: Endpoint, name: str, role: Role) -> None:
        self.attempt, self.endpoint, self.name, self.role = attempt, endpoint, name, role
        self.answers = dict(_answers((attempt.folder / "parts").glob(f"{name}-*.jsonl")))
        """The answers so far, by the keys of their questions."""
        self._earlier = set[str]()
        """Keys of the answers that failed jobs have left."""

    @property
    def prefix(self) -> str:
        """The prefix of the answers that this server gave to jobs of the project that failed."""
        identity = self.endpoint.model_dump(mode="json", include={"base_url", "model", "parameters"})
        digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"cache/judgements/{self.attempt.job.project}/{digest}"

    def ask(self, questions: Callable[[], Iterator[Question]], report: Callable[[int, int], None]) -> None:
        """Ask all `questions`, which can be iterated again. Their answers are then in `answers`.

        `report` is called with the numbers of answers and of questions. Raises `EndpointFailed`.
        """
        attempt, services = self.attempt, self.attempt.services
        try:
            sealed = self.endpoint.api_key
            api_key = None if sealed is None else services.secret_box.open(sealed)
        except ValueError as error:
            message = f"The {self.role}'s key cannot be read: {error}."
            raise EndpointFailed(CODES[self.role][0], message, "api_key") from error
        keys, new_parts = {question.key for question in questions()}, 0

        def keep(fresh: dict[str, Answer]) -> None:
            nonlocal new_parts
            name = f"{self.name}-{attempt.job.attempt:05d}-{new_parts:05d}.jsonl"
            part = attempt.folder / "parts" / name
            _write(part, fresh)
            attempt.lease.outlast(partial(services.storage.put_file, f"{attempt.parts_prefix}/{name}", part))
            new_parts += 1
            self.answers |= fresh
            report(len(self.answers), len(keys))

        (attempt.folder / "parts").mkdir(exist_ok=True)
        earlier = self._earlier_answers(keys)
        if earlier:
            keep(earlier)  # from now on they are this job's: the next attempt has the same
        client = EndpointClient(self.endpoint, api_key, services.settings.private_judges, self.role)
        self.answers = client.ask_all(questions(), self.answers, keep, attempt.lease.check)

    def _earlier_answers(self, keys: set[str]) -> dict[str, Answer]:
        """The answers that failed jobs have paid for, to questions with `keys` that this job has not asked yet."""
        folder, found = self.attempt.folder / f"earlier-{self.name}", dict[str, Answer]()
        try:
            self.attempt.services.storage.get_folder(self.prefix, folder)
            for key, answer in _answers(folder.glob("*.jsonl")):
                self._earlier.add(key)
                if key in keys and key not in self.answers:
                    found.setdefault(key, answer)
        except Exception as error:  # the answers only save money
            self.attempt.log.warning("earlier answers not read", reason=str(error))
        return found

    def leave(self) -> None:
        """Keep the new answers for later jobs, because this one fails."""
        answers = self.answers.items()
        new = {key: answer for key, answer in answers if answer.text is not None and key not in self._earlier}
        if not new:
            return
        attempt = self.attempt
        path = attempt.folder / f"{self.name}.jsonl"
        try:
            _write(path, new)
            key = f"{self.prefix}/{attempt.job.id}.{self.name}.jsonl"  # the job may ask the server in two roles
            counted_objects.put(attempt.services.storage, attempt.services.database, attempt.job.project, key, path)
        except Exception as error:  # the answers only save money
            attempt.log.warning("answers not kept", reason=str(error))

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """The (input, output) tokens of each answer."""
        return [(answer.input_tokens, answer.output_tokens) for answer in self.answers.values()]


def used(asking: Asking) -> JsonObject:
    """The answers, tokens and cost of an endpoint."""
    tokens, price = asking.tokens, asking.endpoint.price
    figures: JsonObject = {
        "role": asking.role,
        "model": asking.endpoint.model,
        "answers": len(tokens),
        "input_tokens": sum(read for read, _ in tokens),
        "output_tokens": sum(written for _, written in tokens),
    }
    if price is not None:
        figures["cost"] = (figures["input_tokens"] * price.input + figures["output_tokens"] * price.output) / 1e6
    return figures


def _write(path: Path, answers: dict[str, Answer]) -> None:
    lines = (json.dumps({"key": key, **vars(answer)}) + "\n" for key, answer in answers.items())
    path.write_text("".join(lines))


def _answers(paths: Iterable[Path]) -> Iterator[tuple[str, Answer]]:
    """(key of the question, answer) of each line in `paths`."""
    for path in sorted(paths):
        for line in path.read_text().splitlines():
            fields = json.loads(line)
            yield fields.pop("key"), Answer(**fields)
