"""Questions to a model of the service, which answers them by greedy decoding."""

from collections.abc import Sequence

from app.spec.datasets.example import Example, Kind
from app.spec.evaluation import SamplingSpec
from worker.trainer.data import Recipe, prompt_ids
from worker.trainer.rendering import Renderer
from worker.trainer.sampling import Prompt
from worker.trainer.sides.completions import Assignment, complete
from worker.trainer.sides.run import SidesRun, context_of

REPLY_TOKENS = 512
"""Maximum tokens of a reply."""
MAX_PROMPT_TOKENS = 1 << 30
"""Large enough that no question is cut. A question that is too long is left out."""


def ask(run: SidesRun, side: str, questions: Sequence[str], parts: str | None = None) -> list[str | None]:
    """The reply of the model of `side` to each question; None to one that does not fit into its context.

    `parts` begins the names of the parts with its replies. By default it is `side`.
    """
    policy = run.load(side)
    room = context_of(policy) - REPLY_TOKENS
    renderer, prompts = Renderer(policy.tokenizer, run.rendering(side)), dict[int, Prompt]()
    for index, text in enumerate(questions):
        example = Example(0, [{"role": "user", "content": text}], ())
        prompt = Prompt(*prompt_ids(example, renderer, Recipe(Kind.RANKED, MAX_PROMPT_TOKENS)))
        if len(prompt.ids) <= room:
            prompts[index] = prompt
    if len(prompts) < len(questions):
        text = f"{len(questions) - len(prompts)} of {len(questions)} questions do not fit into the judge's context."
        run.events.message(text, level="warn")
    greedy = Assignment(SamplingSpec(temperatures=[0.0], max_tokens=REPLY_TOKENS), samples=1, parts=parts)
    replies = {
        completion.row: policy.tokenizer.decode(completion.ids, skip_special_tokens=True)
        for completion in complete(run, policy, side, prompts, greedy)
    }
    return [replies.get(index) for index in range(len(questions))]
