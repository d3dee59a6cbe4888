"""A labelling's run over its work folder."""

from functools import cached_property

from app.spec.labelling import LabellingSpec
from worker.trainer.sides.run import SidesRun


class LabellingRun(SidesRun):
    """Its folder also holds `labelling.json`, and `answered.jsonl` once endpoints have answered the prompts."""

    @cached_property
    def spec(self) -> LabellingSpec:
        """The labelling spec with its defaults filled in. Its files are paths relative to the folder."""
        return LabellingSpec.model_validate_json((self.folder / "labelling.json").read_text()).resolved()
