"""The formula of a `multi` grader: numbers, names of graders, + - * / ^, and some functions.

It is never evaluated as code. Python's own parser reads it. Only the nodes that are named here mean something,
and all others are refused.
"""

import ast
import math
import re
from collections.abc import Callable, Mapping

MAX_CHARACTERS = 1024
_STRANGE = re.compile(r"[^A-Za-z0-9_ .+\-*/^(),]")
FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
"""All of them take one number, except `min` and `max`, which take at least one."""
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: math.pow,
}


class FormulaError(ValueError):
    """A formula that cannot be read. The message ends a sentence that begins with its name."""


class Formula:
    """A formula over `names`. Raises `FormulaError` if it cannot be read, or uses another name."""

    def __init__(self, text: str, names: frozenset[str]) -> None:
        if len(text) > MAX_CHARACTERS:
            raise FormulaError(f"has more than {MAX_CHARACTERS} characters")
        if strange := _STRANGE.search(text):
            raise FormulaError(f"has {strange[0]!r}, which no formula has")
        if "**" in text:
            raise FormulaError("has '**'; a power is written '^'")
        try:
            self._tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
            self._check(self._tree, names)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if isinstance(error, FormulaError):
                raise
            raise FormulaError("is no formula: use numbers, names of graders, + - * / ^ and parentheses") from None

    def __call__(self, values: Mapping[str, float]) -> float:
        """The value for these `values` of its names. Raises `ArithmeticError` or `ValueError` if there is none."""
        value = float(self._value(self._tree, values))
        if not math.isfinite(value):
            raise ArithmeticError("the result is not finite")
        return value

    def _check(self, node: ast.expr, names: frozenset[str]) -> None:
        match node:
            case ast.Constant(value=bool() | complex() | str() | bytes() | None):
                raise FormulaError(f"has {node.value!r}, which is no number")
            case ast.Constant(value=int() | float()):
                pass
            case ast.Name(id=name):
                if name not in names:
                    raise FormulaError(f"names '{name}'; its graders are {', '.join(sorted(names))}")
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                self._check(operand, names)
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
                self._check(left, names)
                self._check(right, names)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                if not arguments or (len(arguments) > 1 and name not in ("min", "max")):
                    raise FormulaError(f"gives '{name}' {len(arguments)} values; it takes one")
                for argument in arguments:
                    self._check(argument, names)
            case ast.Call(func=ast.Name(id=name)):
                raise FormulaError(f"calls '{name}'; its functions are {', '.join(FUNCTIONS)}")
            case _:
                raise FormulaError("has more than numbers, names of graders, + - * / ^ and functions")

    def _value(self, node: ast.expr, values: Mapping[str, float]) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return float(number)
            case ast.Name(id=name):
                return values[name]
            case ast.UnaryOp(op=operator, operand=operand):
                value = self._value(operand, values)
                return -value if isinstance(operator, ast.USub) else value
            case ast.BinOp(left=left, op=operator, right=right):
                return _OPERATORS[type(operator)](self._value(left, values), self._value(right, values))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return FUNCTIONS[name](*(self._value(argument, values) for argument in arguments))
        raise AssertionError(node)  # `_check` has refused it
