"""The parts of the measurement, the most valuable first. Each can be measured without the others."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

from app.spec.json_types import JsonObject


@dataclass(frozen=True)
class Part:
    """A part of the measurement.

    `function` is "module:name" in this package. It yields figures as it measures them. `seconds` is the most time that
    it may take.
    """

    name: str
    function: str
    seconds: float

    def run(self) -> Iterator[JsonObject]:
        """Measure, and yield the figures."""
        module, _, name = self.function.partition(":")
        figures: Iterator[JsonObject] = getattr(import_module(f"bench.gpu.{module}"), name)()
        return figures


PARTS = {
    part.name: part
    for part in (
        Part("card", "card:figures", 60),
        Part("attention", "kernels:attention", 90),
        Part("products", "kernels:products", 30),
        Part("tests", "card:tests", 90),
        Part("step", "steps:one_pack", 120),
        Part("hh", "compare:hh", 180),
        Part("ultrafeedback", "compare:ultrafeedback", 150),
        Part("options", "steps:options", 90),
        Part("hh, 3 epochs", "compare:hh_3_epochs", 120),
        Part("fp8", "steps:in_fp8", 90),
        Part("sampling", "steps:sampling", 60),
        Part("memory", "steps:memory", 60),
        Part("scaling", "steps:scaling", 120),
        Part("unsloth", "unsloth:hh", 240),
    )
}
