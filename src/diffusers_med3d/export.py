"""A pipeline for people without this package: its code in ``pipeline.py`` and one file per network, beside its weights.

diffusers loads such a repository with ``trust_remote_code=True`` (PITFALLS P3). Every file holds all that its class
needs, because diffusers copies each one alone into its cache of modules. The text is cut out of this package's own
sources, definition by definition, when the export is made, so that it is never older than they are.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

from diffusers import DiffusionPipeline, ModelMixin

from . import cards, hub
from .files import whole_folder

PACKAGE = __name__.partition(".")[0]
PIPELINE_FILE = "pipeline"

ALSO_NEEDED = ("einops", "safetensors")
"""Packages that no exported file imports by name: MONAI's attention wants the one, the weights the other."""

STAND_INS = {
    "hub.PublishMixin": 'class PublishMixin:\n    """Publishing needs the package diffusers-med3d."""\n',
    "lora.UNetLoraMixin": (
        'class UNetLoraMixin:\n    """LoRA adapters need the package diffusers-med3d."""\n\n'
        "    def _check_without_adapters(self) -> None:\n        pass\n"
    ),
}
"""What an exported file has in place of what only makes sense inside the package; by module and name."""

_NETWORK_NAMES = '''class _ByName(type):
    """The networks stand in files of their own, so here they are known by the names of their classes."""

    def __instancecheck__(cls, instance):
        return any(base.__name__ == cls.__name__ for base in type(instance).__mro__)
'''

_REFUSE_TO_SAVE = '''

def _refuse_to_save(self, *args, **kwargs):
    """What diffusers would write has no code beside it and could not be loaded again."""
    raise NotImplementedError("Copy the repository, or install diffusers-med3d, whose pipelines can be saved.")


{name}.save_pretrained = {name}.push_to_hub = _refuse_to_save
'''


@dataclass(frozen=True)
class _Imported:
    """``from module import name``, or ``import module`` where ``name`` is empty."""

    module: str
    name: str = ""


@dataclass
class _Source:
    """A module of the package: its lines, its definitions, and what it imports under which name."""

    lines: list[str]
    definitions: dict[str, tuple[ast.stmt, int]] = field(default_factory=dict)  # name -> statement, last line
    imports: dict[str, _Imported] = field(default_factory=dict)


@cache
def _read(module: str) -> _Source:
    path = Path(importlib.import_module(module).__file__)
    text = path.read_text()
    source = _Source(text.split("\n"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    previous: list[str] = []
    for statement in ast.parse(text).body:
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if is_text:  # a text below an assignment belongs to it
            for name in previous:
                source.definitions[name] = (source.definitions[name][0], statement.end_lineno)
            previous = []
            continue
        previous = []
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                source.imports[alias.asname or alias.name.partition(".")[0]] = _Imported(alias.name)
        elif isinstance(statement, ast.ImportFrom):
            origin = "." * statement.level + (statement.module or "")
            origin = importlib.util.resolve_name(origin, package) if statement.level else origin
            for alias in statement.names:
                source.imports[alias.asname or alias.name] = _Imported(origin, alias.name)
        elif isinstance(statement, ast.ClassDef | ast.FunctionDef):
            source.definitions[statement.name] = (statement, statement.end_lineno)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            parts = [node for target in targets for node in ast.walk(target)]
            previous = [node.id for node in parts if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
            for name in previous:
                source.definitions[name] = (statement, statement.end_lineno)
    return source


class _Uses(ast.NodeVisitor):
    """Names that a definition uses: as values, and as types alone (annotations, second argument of isinstance)."""

    def __init__(self, statement: ast.stmt) -> None:
        self.values: set[str] = set()
        self.types: set[str] = set()
        self._found = self.values
        self.visit(statement)

    def _types_in(self, *nodes: ast.AST | None) -> None:
        before, self._found = self._found, self.types
        for node in nodes:
            if node is not None:
                self.visit(node)
        self._found = before

    def visit_Name(self, node: ast.Name) -> None:
        self._found.add(node.id)

    def visit_arg(self, node: ast.arg) -> None:
        self._types_in(node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._types_in(node.annotation)
        for part in (node.target, node.value):
            if part is not None:
                self.visit(part)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._types_in(node.returns)
        for part in [*node.decorator_list, node.args, *node.body]:
            self.visit(part)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance" and len(node.args) == 2:
            self.visit(node.args[0])
            self._types_in(node.args[1])
        else:
            self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or (node.module or "").partition(".")[0] == PACKAGE:
            raise ValueError(f"line {node.lineno} imports a part of the package inside a function; import it on top.")


def _origin(module: str, name: str) -> tuple[str, str] | _Imported | None:
    """Where ``name`` in ``module`` comes from: (module, name) within the package, an import of others, or nowhere."""
    source = _read(module)
    if name in source.definitions:
        return module, name
    imported = source.imports.get(name)
    if imported is None:
        return None
    if imported.module.partition(".")[0] != module.partition(".")[0]:
        return imported
    if isinstance(getattr(importlib.import_module(module), name), ModuleType):
        raise ValueError(
            f"{module} uses the module {name!r}; import the names in it instead, so that they can be cut out."
        )
    return _origin(imported.module, imported.name)


def standalone_source(root: type) -> str:
    """Python source of one file that defines ``root`` and needs nothing of the package that ``root`` is from.

    Args:
        root: class of a pipeline or a network. In the file of a pipeline the networks of the package stand as types
            that are known by name.

    Raises:
        ValueError: two definitions of the same name, a network that a pipeline uses for more than its type, modules
            that need each other, or an import that cannot be followed.
    """
    is_pipeline = issubclass(root, DiffusionPipeline)
    pending, needed = [(root.__module__, root.__name__)], {}
    needs: dict[str, set[str]] = {}  # module -> modules whose definitions must come before
    others: dict[str, _Imported] = {}
    networks: set[str] = set()
    while pending:
        module, name = pending.pop()
        if needed.setdefault(name, module) != module:
            raise ValueError(f"{name!r} is defined in {needed[name]} and in {module}; one file cannot hold both.")
        statement, _ = _read(module).definitions[name]
        uses = _Uses(statement)
        for used in sorted(uses.values | uses.types) if _stand_in(module, name) is None else ():
            origin = _origin(module, used)
            if origin is None:
                continue
            if isinstance(origin, _Imported):
                if others.setdefault(used, origin) != origin:
                    raise ValueError(f"{used!r} means {others[used]} in one module and {origin} in {module}.")
                continue
            if origin[1] != used:
                raise ValueError(f"{module} imports {origin[1]!r} as {used!r}; exported code needs one name for it.")
            if _is_network(origin) and (used not in uses.values or is_pipeline):
                if used in uses.values:
                    raise ValueError(f"{module}.{name} uses {used} for more than its type; it stands in another file.")
                networks.add(used)
            elif needed.get(used) != origin[0]:
                pending.append(origin)
            if origin[0] != module:
                needs.setdefault(module, set()).add(origin[0])
    networks -= needed.keys()
    if others.keys() & needed.keys():
        raise ValueError(f"{sorted(others.keys() & needed.keys())} are defined in one module and imported in another.")
    modules = [module for module in TopologicalSorter(needs).static_order() if module in needed.values()]
    modules += sorted(set(needed.values()) - set(modules))
    blocks = [_cut(module, {name for name, place in needed.items() if place == module}) for module in modules]
    text = _header(root, modules) + _import_lines(others) + "\n\n"
    if networks:
        markers = [
            f'class {name}(metaclass=_ByName):\n    """See the file of this network."""\n' for name in sorted(networks)
        ]
        text += "\n\n".join([_NETWORK_NAMES, *markers]) + "\n\n"
    text += "\n\n".join(blocks) + (_REFUSE_TO_SAVE.format(name=root.__name__) if is_pipeline else "")
    compile(text, f"{root.__name__}.py", "exec")
    return text


def _stand_in(module: str, name: str) -> str | None:
    return STAND_INS.get(f"{module.partition('.')[2]}.{name}")


def _is_network(origin: tuple[str, str]) -> bool:
    value = getattr(importlib.import_module(origin[0]), origin[1])
    return isinstance(value, type) and issubclass(value, ModelMixin)


def _cut(module: str, names: Iterable[str]) -> str:
    """The text of these definitions, in their order in the module, with the comments directly above them."""
    source = _read(module)
    spans, stand_ins = set(), []
    for name in names:
        statement, last = source.definitions[name]
        stand_in = _stand_in(module, name)
        if stand_in is not None:
            stand_ins.append(stand_in)
            continue
        decorators = [node.lineno for node in getattr(statement, "decorator_list", [])]
        first = min([statement.lineno, *decorators])
        while first > 1 and source.lines[first - 2].startswith("#"):
            first -= 1
        spans.add((first, last))
    cut = ["\n".join(source.lines[first - 1 : last]) + "\n" for first, last in sorted(spans)]
    return "\n\n".join([*stand_ins, *cut])


def _header(root: type, modules: Iterable[str]) -> str:
    places = ", ".join(module.partition(".")[2] or module for module in modules)
    return (
        f'"""{root.__name__} of diffusers-med3d in one file that does not need the package. Never for clinical use.\n\n'
        f"Made by diffusers_med3d.export from {places}; change it there.\n"
        'The code is under Apache-2.0, the weights are under the licence in README.md.\n"""\n\n'
    )


def _import_lines(imports: dict[str, _Imported]) -> str:
    plain, named = set(), {}
    for local, imported in imports.items():
        if imported.name:
            entry = imported.name if imported.name == local else f"{imported.name} as {local}"
            named.setdefault(imported.module, set()).add(entry)
        else:
            same = imported.module.partition(".")[0] == local
            plain.add(f"import {imported.module}" if same else f"import {imported.module} as {local}")
    lines = plain | {f"from {module} import {', '.join(sorted(names))}" for module, names in named.items()}
    standard = {line for line in lines if _top_level(line) in sys.stdlib_module_names}
    groups = [sorted(group) for group in (standard, lines - standard) if group]
    return "\n\n".join("\n".join(group) for group in groups) + "\n"


def _top_level(import_line: str) -> str:
    return import_line.split()[1].partition(".")[0]


def requirements(sources: Iterable[str]) -> list[str]:
    """Packages that exported files import, with the versions that diffusers-med3d itself asks for, sorted."""
    modules = {
        name
        for source in sources
        for line in re.findall(r"^(?:import|from) \S+", source, re.MULTILINE)
        if (name := _top_level(line)) not in sys.stdlib_module_names
    }
    found = importlib.metadata.packages_distributions()
    wanted = {found.get(module, [module])[0] for module in modules} | set(ALSO_NEEDED)
    lines = [line for line in importlib.metadata.requires("diffusers-med3d") or [] if "extra ==" not in line]
    asked = {re.match(r"[\w.-]+", line).group(): line for line in lines}
    return sorted(asked.get(name, name) for name in wanted)


def export_standalone(
    pipeline: DiffusionPipeline,
    folder: str | os.PathLike,
    name: str,
    card: str | None = None,
    revision: str | None = None,
) -> list[str]:
    """Write ``pipeline`` with its code, so that it loads without this package.

    ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` then gives the same volumes from the same
    noise. It cannot be saved again, and has no LoRA: both need the package.

    Args:
        pipeline: of this package; components from diffusers (schedulers) stay as they are.
        folder: must not exist or be empty; it appears whole or not at all.
        name: Hub id that the card's snippet loads.
        card: text of the pipeline's card; by default one made from what the pipeline tells about itself.
        revision: branch that the card's snippet loads from.

    Returns:
        Paths of the files below ``folder``.

    Raises:
        FileExistsError: ``folder`` holds something.
        ValueError: sources that cannot be cut out (see `standalone_source`), or something local in a file.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty.")
    with whole_folder(folder) as target:
        pipeline.save_pretrained(target)
        index_file = target / "model_index.json"
        index, sources = json.loads(index_file.read_text()), []
        for part, component in pipeline.components.items():
            kind = type(component)
            if kind.__module__.partition(".")[0] == PACKAGE:
                index[part] = [kind.__name__.lower(), kind.__name__]
                sources.append(standalone_source(kind))
                (target / part / f"{kind.__name__.lower()}.py").write_text(sources[-1])
        index["_class_name"] = [PIPELINE_FILE, type(pipeline).__name__]
        sources.append(standalone_source(type(pipeline)))
        (target / f"{PIPELINE_FILE}.py").write_text(sources[-1])
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        needed = requirements(sources)
        (target / "requirements.txt").write_text("\n".join(needed) + "\n")
        text = card or str(cards.of_folder(target, name).render())
        (target / "README.md").write_text(
            cards.replace_section(text, "Use", _use(name, revision, needed)).rstrip() + "\n"
        )
        files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
        hub.check_publishable(target, files)
    return files


def _use(name: str, revision: str | None, needed: Iterable[str]) -> str:
    branch = f', revision="{revision}"' if revision else ""
    packages = " ".join(f'"{line}"' for line in needed)
    return f"""This form carries its code and needs no package diffusers-med3d. `trust_remote_code=True` runs that
code: read `pipeline.py` and the file beside each network first.

```bash
pip install {packages}
```

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}"{branch}, trust_remote_code=True)
out = pipe(num_samples=2, num_inference_steps=30, generator=torch.Generator().manual_seed(0))
out.save_nifti("samples")
```"""
