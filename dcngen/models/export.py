"""The model as one Python file that runs without dcngen: for folders that strangers load with trust_remote_code.

The file is put together from the sources of this package, so that there is one implementation to keep right. It takes
the compiled operator where dcngen is installed, and otherwise the plain-torch reference: the same function, slower.
"""

from __future__ import annotations

import ast
import inspect
import sys
from types import ModuleType

import dcngen
import dcngen.models.channels_last
import dcngen.models.operators
import dcngen.models.unet
import dcngen.nn.blocks
import dcngen.nn.dcnv4
import dcngen.ops.geometry
import dcngen.ops.reference

MODULE_NAME = "modeling_dcn_unet"

# In the order in which they need one another.
PARTS = (
    dcngen.ops.geometry,
    dcngen.ops.reference,
    dcngen.nn.dcnv4,
    dcngen.nn.blocks,
    dcngen.models.channels_last,
    dcngen.models.operators,
    dcngen.models.unet,
)

HEADER = '''"""DCNUNet2DModel in one file, written by dcngen {version}. SPDX-License-Identifier: Apache-2.0

A UNet2DModel with deformable convolution v4 (arXiv 2401.06197) in the place of convolutions and attention. With dcngen
installed its compiled operator is used, otherwise the reference below: the same function, slower.
"""

from __future__ import annotations

{imports}
'''

OPERATOR = """
try:
    from dcngen.ops import dcnv4, dcnv4_packed, dcnv4_packed_linear, has_linear_kernel, linear
except ModuleNotFoundError:
    dcnv4, dcnv4_packed = dcnv4_reference, dcnv4_packed_reference
    dcnv4_packed_linear = dcnv4_packed_linear_reference
    linear = F.linear

    def has_linear_kernel(input: torch.Tensor, weight: torch.Tensor, *, backward: bool = False) -> bool:
        return False
"""


def self_contained_model_source() -> str:
    """The text of `modeling_dcn_unet.py`: DCNUNet2DModel and all it needs from this package.

    The file needs torch and diffusers alone, and exposes DCNUNet2DModel and ModelMixin.

    Raises:
        ValueError: two parts define one name differently, or a part imports from dcngen in a way that one file cannot
            reproduce (a module, or a name under another).
    """
    _refuse_clashes()
    imports: set[tuple[str, str]] = set()
    bodies = []
    for part in PARTS:
        outside, body = _split_imports(part)
        imports |= outside
        bodies.append(body)
        if part is dcngen.ops.reference:
            bodies.append(OPERATOR.strip())
    header = HEADER.format(version=dcngen.__version__, imports=_import_lines(imports))
    return header + "\n\n" + "\n\n\n".join(bodies) + "\n"


def _split_imports(module: ModuleType) -> tuple[set[tuple[str, str]], str]:
    """The imports from outside dcngen as (module or "", name), and the source without imports and module docstring."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    outside = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if not _is_inside(node, module):
                outside |= {(getattr(node, "module", ""), ast.unparse(alias)) for alias in node.names}
        elif not _is_docstring(node):
            continue
        for i in range(node.lineno - 1, node.end_lineno):
            lines[i] = None
    return outside, "\n".join(line for line in lines if line is not None).strip()


def _import_lines(imports: set[tuple[str, str]]) -> str:
    """One line a module, the standard library first, in each part `import` before `from`."""
    lines = [f"import {name}" for module, name in imports if not module]
    for source in {module for module, _ in imports if module}:
        lines.append(f"from {source} import {', '.join(sorted(name for module, name in imports if module == source))}")
    standard, other = [], []
    for line in sorted(lines, key=lambda line: (line.startswith("from "), line)):
        top = line.split()[1].split(".")[0]
        (standard if top in sys.stdlib_module_names else other).append(line)
    return "\n".join([*standard, "", *other])


def _is_inside(node: ast.Import | ast.ImportFrom, module: ModuleType) -> bool:
    """Whether the import is of this package, or of __future__, which the header has."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return True
    relative = isinstance(node, ast.ImportFrom) and node.level > 0
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    inside = relative or any(name.split(".")[0] == "dcngen" for name in names)
    if inside and (isinstance(node, ast.Import) or any(alias.asname for alias in node.names)):
        raise ValueError(f"{module.__name__}: expected `from dcngen... import name`, got {ast.unparse(node)!r}")
    return inside


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _refuse_clashes() -> None:
    """One name must mean one thing in the joined file."""
    owner: dict[str, str] = {}
    for part in PARTS:
        for node in ast.parse(inspect.getsource(part)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            else:
                continue
            for name in names:
                if name in owner:
                    raise ValueError(f"{name}: defined by {owner[name]} and by {part.__name__}; rename one of them")
                owner[name] = part.__name__
