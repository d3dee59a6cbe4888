"""The answers to the prompts of a labelling, by the models that write them and from the data."""

from app.spec.datasets.example import Example
from app.spec.json_types import JsonObject
from worker.answers import DATA
from worker.trainer.data import answer_text, prompt_text
from worker.trainer.labelling.prompts import Prompt
from worker.trainer.labelling.run import LabellingRun
from worker.trainer.sampling import text_of
from worker.trainer.sides.completions import Assignment, complete, prompts_of
from worker.trainer.sides.rows import Item


def write(run: LabellingRun, prompts: dict[int, Prompt]) -> list[Item]:
    """One item per prompt, with the answers that the data has and those of the models.

    An answer names its `writer` by number, and its place among the answers of that writer.
    """
    items: dict[int, Item] = {
        row: {
            "line": prompt.example.line,
            "row": row,
            "prompt": prompt_text(prompt.example),
            "source": _source(prompt.example),
            "answers": [
                {"writer": DATA, "place": place, "text": answer_text(answer), "ended": True}
                for place, answer in enumerate(prompt.own)
            ],
        }
        for row, prompt in prompts.items()
    }
    sampling, examples = run.spec.sampling, {row: prompt.example for row, prompt in prompts.items()}
    models = [number for number, writer in enumerate(run.spec.writers) if writer.model is not None]
    for number in models:
        assert sampling is not None
        side = f"writers.{number}"
        policy = run.load(side)
        rendered = prompts_of(run, policy, side, examples, sampling.max_tokens)
        of_all = run.spec.answers_of_a_writer * len(models)
        assignment = Assignment(sampling, sampling.samples, stream=number, of_all=of_all)
        for completion in complete(run, policy, side, rendered, assignment):
            text = text_of(policy, completion, rendered[completion.row], examples[completion.row])
            place = sampling.temperatures.index(completion.temperature) * sampling.samples + completion.sample
            answer = {"writer": number, "place": place, "text": text, "ended": completion.ended}
            items[completion.row]["answers"].append(answer)
        del policy
    return list(items.values())


def _source(example: Example) -> JsonObject:
    """The prompt in the columns of a dataset."""
    columns = {"prompt": example.prompt, "system": example.system, "tools": list(example.tools)}
    return {name: value for name, value in columns.items() if value or name == "prompt"}
