"""The form of the code that `docs/contributing.md` describes: layers, private names, mixins, signatures, docstrings, sizes."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from anndata import AnnData

import ldvae_ext

SRC = Path(ldvae_ext.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

# A layer and the layers that it may import.
ALLOWED = {
    "kernels": {"kernels"},
    "core": {"core", "kernels", "_files", "_formats", "_validate"},
    "backends": {"backends", "core", "kernels", "_scvi", "_steps", "_validate"},
    "module": {"backends", "core", "module", "_scvi", "_validate"},
    "model": {
        "backends", "core", "kernels", "module", "model", "_docs", "_files", "_folder", "_groups", "_keys", "_progress", "_scvi", "_row_store", "_stats", "_steps", "_formats", "_validate", "_writing",
    },
    "get": {"core", "get", "_formats", "_validate", "_keys", "_groups", "_stats"},
    "tl": {"core", "get", "tl", "_docs", "_formats", "_validate", "_keys", "_groups", "_progress", "_row_store", "_writing"},
    "pl": {"core", "get", "pl", "_groups", "_validate", "_keys"},
    "datasets": {"core", "_validate", "_keys"},
    "_docs": set(),
    "_folder": {"_files", "_formats"},
    "_groups": {"_validate", "_keys"},
    "_progress": set(),
    "_row_store": {"_files", "_folder"},
    "_scvi": set(),
    "_steps": set(),
    "_stats": set(),
    "_keys": set(),
    "_writing": {"core", "_formats", "_validate", "_keys"},
    "_files": set(),
    "_formats": set(),
    "_validate": set(),
}  # fmt: skip
# A layer and the libraries that may not be there, not even inside a function.
FORBIDDEN = {
    "kernels": {"anndata", "pandas", "scipy", "torch", "scvi", "scanpy", "matplotlib"},
    "core": {"anndata", "pandas", "torch", "scvi", "scanpy", "matplotlib"},
    "backends": {"anndata", "scanpy", "matplotlib"},
    "get": {"torch", "scvi", "lightning", "matplotlib"},
    "tl": {"torch", "scvi", "lightning", "matplotlib"},
    "pl": {"torch", "scvi", "lightning", "seaborn"},
    "module": {"anndata", "scanpy", "matplotlib"},
    "model": {"matplotlib"},
    "datasets": {"torch", "scvi", "lightning"},
}
# Class attributes with which scvi-tools lets a subclass choose its parts.
EXTENSION_POINTS = {
    "_data_loader_cls",
    "_module_cls",
    "_training_plan_cls",
    "_data_splitter_cls",
    "_LATENT_QZM_KEY",
    "_LATENT_QZV_KEY",
}


def layer(path):
    part = path.relative_to(SRC).parts[0]
    return part.removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{node.module}.{alias.name}" if node.module == "ldvae_ext" else node.module for alias in node.names
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_run_one_way(path):
    here = layer(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in FORBIDDEN.get(here, set()), f"{here} imports {name}"
        if top == "ldvae_ext" and here in ALLOWED and rest:
            assert rest.split(".")[0] in ALLOWED[here], f"{here} imports {name}"


def names_of_imports(path, *, at_runtime=False):
    """Full name of everything that a file imports; with ``at_runtime`` without what only a type checker sees."""
    tree = ast.parse(path.read_text())
    if at_runtime:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_numba_is_imported_in_kernels_alone(path):
    if layer(path) != "kernels":
        assert not [name for name in names_of_imports(path) if name.split(".")[0] == "numba"]


def kernel_functions():
    for path in sorted((SRC / "kernels").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list and path.name != "threads.py":
                yield pytest.param(path.name, node, id=f"{path.stem}.{node.name}")


@pytest.mark.parametrize(("file", "node"), list(kernel_functions()))
def test_arguments_of_compiled_loops_have_types_and_are_documented(file, node):
    annotations = {a.arg: ast.unparse(a.annotation) for a in node.args.args}
    assert "Any" not in {*annotations.values(), ast.unparse(node.returns)}
    # Functions of single numbers have no shapes to document.
    if file != "vector_math.py" and not node.name.startswith("_"):
        documented = ast.get_docstring(node).split("Parameters\n")[1]
        missing = [name for name in annotations if not re.search(rf"^(.*, )?{name}(, .*)?$", documented, re.M)]
        assert not missing


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_private_names_of_scvi_tools_are_imported_by_one_file(path):
    if path.name == "_scvi.py":
        return
    for name in names_of_imports(path):
        top, *rest = name.split(".")
        if top in ("scvi", "lightning"):
            assert not [part for part in rest if part.startswith("_")], name


def test_tests_of_the_mathematics_need_no_torch():
    heavy = {"torch", "scvi", "lightning", "scanpy"}
    heavy |= {f"ldvae_ext.{layer}" for layer in ("backends", "model", "module")}
    for path in [file for room in ("core", "kernels") for file in (Path(__file__).parent / room).glob("*.py")]:
        for name in names_of_imports(path):
            assert not any(name == other or name.startswith(f"{other}.") for other in heavy), (path.name, name)


def test_there_are_no_import_circles():
    modules = {".".join(("ldvae_ext", *path.relative_to(SRC).with_suffix("").parts)): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {}
    for name, path in modules.items():
        imported = set()
        for full in names_of_imports(path, at_runtime=True):
            # A package stands for its own file only where it is imported as a whole.
            target = full if full in modules else full.rpartition(".")[0]
            if target in modules and target not in (name, "ldvae_ext"):
                imported.add(target)
        graph[name] = imported
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"import circle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name in done:
            return
        open_.append(name)
        for target in sorted(graph[name]):
            visit(target)
        open_.pop()
        done.add(name)

    for name in graph:
        visit(name)


def own_classes():
    """All classes of the layers that extend scvi-tools."""
    for path in FILES:
        if layer(path) in ("backends", "module", "model", "_scvi", "_steps"):
            name = ".".join(("ldvae_ext", *path.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__")
            for thing in vars(importlib.import_module(name)).values():
                if inspect.isclass(thing) and thing.__module__ == name:
                    yield thing


def test_private_methods_of_scvi_tools_are_overridden_by_one_file():
    for cls in own_classes():
        if cls.__module__ == "ldvae_ext._scvi":
            continue
        theirs = [base for base in cls.__mro__ if base.__module__.split(".")[0] in ("scvi", "lightning")]
        for name in vars(cls):
            if name.startswith("_") and not name.startswith("__") and name not in EXTENSION_POINTS:
                owners = [base.__qualname__ for base in theirs if callable(vars(base).get(name))]
                assert not owners, f"{cls.__qualname__}.{name} overrides that of {owners}"


def test_no_mixin_inherits_from_a_mixin():
    mixins = [cls for cls in own_classes() if cls.__name__.endswith("Mixin")]
    assert len(mixins) < 12
    for cls in mixins:
        assert [base.__name__ for base in cls.__bases__] in (["object"], ["LDVAEBase"]), cls


def test_only_one_file_spells_an_anndata_key():
    spelled = [
        f"{path.name}:{node.lineno} {node.value!r}"
        for path in FILES
        if path.name != "_keys.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and node.value in ("X_ldvae", "X_ldvae_var", "ldvae_loadings", "X_pca", "PCs", "z_true")
    ]
    assert spelled == []


def test_importing_the_package_loads_nothing_heavy():
    code = "import ldvae_ext, ldvae_ext.core, sys; print([m for m in ('torch', 'scvi', 'pandas', 'anndata', 'matplotlib') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    code = "import ldvae_ext; ldvae_ext.get, ldvae_ext.tl, ldvae_ext.pl, ldvae_ext.datasets; import sys; print('torch' in sys.modules, 'scvi' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False False"
    )
    code = "import ldvae_ext.tl, sys; print([m for m in ('scanpy', 'matplotlib', 'sklearn') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_rooms_open_at_first_use_and_others_do_not_exist():
    assert ldvae_ext.model.LDVAE.__name__ == "LDVAE"
    assert set(ldvae_ext.__all__) <= set(dir(ldvae_ext))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ldvae_ext.nothing


def public_functions():
    for where in (ldvae_ext.get, ldvae_ext.tl, ldvae_ext.pl, ldvae_ext.datasets, ldvae_ext.core):
        for name in getattr(where, "__all__", [n for n in vars(where) if not n.startswith("_")]):
            thing = getattr(where, name)
            if inspect.isfunction(thing) and thing.__module__.startswith("ldvae_ext"):
                yield f"{where.__name__.split('.')[-1]}.{name}", thing


def public_methods():
    for cls in (ldvae_ext.model.LDVAE, ldvae_ext.core.LinearDecoder):
        for name, member in inspect.getmembers(cls):
            if (
                not name.startswith("_")
                and inspect.isroutine(member)
                and (member.__module__ or "").startswith("ldvae_ext")
            ):
                yield f"{cls.__name__}.{name}", member


@pytest.mark.parametrize(
    ("name", "function"), [*public_functions(), *public_methods()], ids=lambda v: v if isinstance(v, str) else ""
)
def test_public_callables_are_documented_and_annotated(name, function):
    doc = inspect.getdoc(function)
    assert doc, name
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty
    for parameter in parameters:
        assert parameter.annotation is not inspect.Parameter.empty, parameter
    if len(parameters) > 1:
        assert "Parameters\n----------" in doc
        for parameter in parameters:
            assert parameter.name in doc, parameter


@pytest.mark.parametrize(
    ("name", "function"),
    [f for f in public_functions() if f[0].startswith(("get", "tl", "pl"))],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_functions_on_anndata_take_it_first_and_little_else_by_position(name, function):
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert len(positional) <= 3
    if name not in ("pl.training_curves", "pl.match", "tl.match_factors"):
        assert positional[0].annotation is AnnData
    if name.startswith("pl."):
        by_name = {p.name: p for p in parameters}
        assert by_name["show"].default is None
        assert by_name["return_fig"].default is False
        assert "save" not in by_name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_are_short(path):
    """Examples in docstrings do not count: they make a page longer, not the code."""
    text = re.sub(r"^\n *Examples\n *-+\n(?:.*\n)+?(?= *\"\"\")", "", path.read_text(), flags=re.M)
    assert len(text.splitlines()) <= 400
