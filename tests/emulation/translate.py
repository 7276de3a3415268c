"""CUDA sources as C++ that any compiler takes: the few things that headers cannot stand in for.

Asm statements become calls of the functions of machine/ptx.h, one an instruction, in the order of the text; shared
memory becomes a place that the machine gives. Launches are those of kernels/cuda/launch.h: kernel<<<...>>>(...) is an
error. Lines keep their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\((\d+)\) )?([\w ]+?) (\w+)\[\];")
_STATIC_SHARED = re.compile(r"(?<!extern )__shared__ ([\w:]+) (\w+)((?:\[\w+\])*);")
_ASM = re.compile(r"\basm\s*(?:volatile\s*)?\(")


class TranslationError(ValueError):
    """Something in a kernel source that the emulation does not know."""


def translate(source: str, name: str) -> str:
    """The source of the file called `name`, which messages of the compiler go on to call it by."""
    site = iter(range(1, 1000))

    def dynamic_shared(m: re.Match) -> str:
        return f"{m[2]}* const {m[3]} = reinterpret_cast<{m[2]}*>(::emulation::dynamic_shared({m[1] or 16}));"

    def static_shared(m: re.Match) -> str:
        memory = f"::emulation::static_shared({next(site)}, sizeof(shared_{m[2]}), 16)"
        return f"using shared_{m[2]} = {m[1]}{m[3]}; auto& {m[2]} = *static_cast<shared_{m[2]}*>({memory});"

    source = _STATIC_SHARED.sub(static_shared, _DYNAMIC_SHARED.sub(dynamic_shared, source))
    for number, line in enumerate(source.splitlines(), start=1):
        if left := re.search(r"__shared__|<<<", line.split("//")[0]):
            raise TranslationError(f"{name}, line {number}: cannot translate this {left[0]}")
    return f'#line 1 "{name}"\n' + _translate_asm(source, name)


def _line(source: str, at: int) -> int:
    return source.count("\n", 0, at) + 1


def _translate_asm(source: str, name: str) -> str:
    parts, end = [], 0
    for number, match in enumerate(_ASM.finditer(source)):
        closing = _closing(source, match.end())
        try:
            calls = _calls(source[match.end() : closing], number)
        except TranslationError as error:
            raise TranslationError(f"{name}, line {_line(source, match.start())}: {error}") from None
        newlines = "\n" * source.count("\n", match.start(), closing)
        parts += [source[end : match.start()], f"do {{ {calls} }} while (false){newlines}"]
        end = closing + 1
    return "".join([*parts, source[end:]])


def _closing(source: str, begin: int) -> int:
    """Where the parenthesis closes that opened before `begin`; strings may hold others."""
    depth, at = 1, begin
    while depth:
        if source[at] == '"':
            at = source.index('"', at + 1)
        depth += {"(": 1, ")": -1}.get(source[at], 0)
        at += 1
    return at - 1


def _calls(statement: str, number: int) -> str:
    sections = _sections(statement)
    text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', sections[0])).replace("\\n", "\n")
    operands = [operand for section in sections[1:3] for operand in _operands(section)]
    return " ".join(_statements(text, operands, number))


def _sections(statement: str) -> list[str]:
    """The template, outputs, inputs and clobbers: what stands between the colons outside parentheses and strings."""
    sections, depth, quoted = [""], 0, False
    for letter in statement:
        quoted ^= letter == '"'
        depth += 0 if quoted else {"(": 1, ")": -1}.get(letter, 0)
        if letter == ":" and depth == 0 and not quoted:
            sections.append("")
        else:
            sections[-1] += letter
    return sections


def _operands(section: str) -> Iterator[str]:
    """The expressions of `"constraint"(expression), ...`."""
    at = 0
    while found := re.compile(r'"[^"]*"\s*\(').search(section, at):
        closing = _closing(section, found.end())
        yield section[found.end() : closing]
        at = closing + 1


def _statements(text: str, operands: list[str], number: int) -> Iterator[str]:
    for line in re.split(r"[;\n]", text):
        line = line.strip()
        if found := re.fullmatch(r"\.reg \.pred (\w+)", line):
            yield f"bool {found[1]}_{number} = false;"
        elif found := re.fullmatch(r"(\w+):", line):
            yield f"{found[1]}_{number}:;"
        elif line.strip("{}"):
            yield _instruction(line, operands, number)


def _instruction(line: str, operands: list[str], number: int) -> str:
    found = re.fullmatch(r"(?:@(!?)(\w+) )?([a-z][\w.:]*)(.*)", line)
    if found is None:
        raise TranslationError(f"no instruction: {line}")
    negated, predicate, mnemonic, rest = found.groups()
    values = [value.strip() for value in re.sub(r"[\[\]{}]", "", rest).split(",")]
    arguments = [_argument(value, operands, number) for value in values if value not in ("", "_")]
    function = re.sub(r"[.:]+", "_", mnemonic)
    call = f"goto {arguments[0]};" if mnemonic == "bra" else f"::emulation::ptx::{function}({', '.join(arguments)});"
    return f"if ({negated}{predicate}_{number}) {call}" if predicate else call


def _argument(value: str, operands: list[str], number: int) -> str:
    """An operand's expression, a number as it is, or a name of the statement's own, which gets its number."""
    if value.startswith("%"):
        return f"({operands[int(value[1:])]})"
    return value if value.isdigit() else f"{value}_{number}"
