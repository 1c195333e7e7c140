"""What we override or read of transformers, trl, peft, accelerate, datasets and torch, beyond what they promise to
keep: `data/upstream.txt` has it all, with signatures. An upgrade that changes one fails with that line alone."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
TABLE = Path(__file__).parents[1] / "data" / "upstream.txt"
UPSTREAM = ("accelerate", "datasets", "huggingface_hub", "peft", "torch", "transformers", "trl")
# Documented, and the same for many years.
STABLE_MODULES = {"torch.nn", "torch.utils.checkpoint", "accelerate.utils", "huggingface_hub.errors"}
STABLE_METHODS = {"forward", "backward", "__init__", "__call__"}
# Private names that are read of objects which are no part of ours, and the module that gives them their meaning.
READ = {
    "_buffers": "torch.nn.modules.module",
    "_modules": "torch.nn.modules.module",
    "_parameters": "torch.nn.modules.module",
    "_attn_implementation": "transformers.configuration_utils",
    "_commit_hash": "transformers.configuration_utils",
    "_data_files": "datasets.arrow_dataset",
    "_forward_hooks": "torch.nn.modules.module",
    "_forward_pre_hooks": "torch.nn.modules.module",
    "_from_config": "transformers.modeling_utils",
    "_from_model_config": "transformers.generation.configuration_utils",
    "_fsdp_": "torch.distributed.fsdp._common_utils",
    "_hf_hook": "accelerate.hooks",
    "_is_amx_tile_supported": "torch.cpu",
    "_iter_named_params": "trl.generation.vllm_generation",
    "_is_avx512_supported": "torch.cpu",
    "_linear_pointwise": "torch._meta_registrations",
    "_llm_weights_sleeping": "trl.generation.vllm_generation",
    "_name_or_path": "transformers.configuration_utils",
    "_stored_metrics": "trl.experimental.cpo.cpo_trainer",
    "_weight_conversions": "transformers.core_model_loading",
}


def home(thing: Any) -> str:
    return thing.__module__.split(".")[0]


def full(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def parameters_of(function: Any) -> str:
    """(self, x, *, y=1): names and defaults, without types, which change often and break nothing."""
    signature = inspect.signature(getattr(function, "__func__", function), follow_wrapped=True)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def our_modules() -> Iterator[ModuleType]:
    for package in PACKAGES:
        yield (found := importlib.import_module(package))
        for info in pkgutil.walk_packages(found.__path__, f"{package}."):
            yield importlib.import_module(info.name)


def tree_of(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))


def our_classes() -> list[type]:
    """Those that have a base of someone else's, mixins with what they are mixed into."""
    found = {value for module in our_modules() for value in vars(module).values() if inspect.isclass(value)}
    return [cls for cls in found if home(cls) in PACKAGES and any(home(base) in UPSTREAM for base in cls.__mro__)]


@cache
def source_of(cls: type) -> str:
    """Empty for a class that is made by a call, and for one that is not written in Python."""
    with suppress(OSError, TypeError):
        return inspect.getsource(cls)
    return ""


def members() -> Iterator[str]:
    """Methods and private attributes that we override, and private ones that we call or read of ourselves."""
    for cls in our_classes():
        ours = [base for base in cls.__mro__ if home(base) in PACKAGES]
        theirs = [
            base for base in cls.__mro__ if home(base) in UPSTREAM and base.__module__ != "torch.autograd.function"
        ]
        written = {name for base in ours for name in re.findall(r"\b(?:self|super\(\))\.(_[a-z]\w*)", source_of(base))}
        for name in {name for base in ours for name in vars(base)} - STABLE_METHODS | written:
            base = next((base for base in theirs if name in vars(base)), None)
            if base is not None and not name.startswith("__") and name != "_abc_impl":
                value = inspect.getattr_static(base, name)
                if callable(getattr(value, "__func__", value)):
                    yield f"{full(base)}.{name}{parameters_of(value)}"
                elif name.startswith("_"):
                    yield f"{full(base)}.{name}"
            elif base is None and name in written:
                setters = (base for base in theirs if re.search(rf"\bself\.{name}\b *(:.*)?=", source_of(base)))
                yield from (f"{full(base)}: self.{name}" for base in islice(setters, 1))


def imports() -> Iterator[str]:
    """Functions from the depths of a package, whose names its front door does not have."""
    for module in our_modules():
        for node in ast.walk(tree_of(module)):
            if not isinstance(node, ast.ImportFrom) or node.level or "." not in (node.module or ""):
                continue
            if node.module.split(".")[0] not in UPSTREAM or node.module in STABLE_MODULES:
                continue
            for alias in node.names:
                found = getattr(importlib.import_module(node.module), alias.name, None)
                front = getattr(sys.modules[node.module.split(".")[0]], alias.name, None)
                if inspect.isfunction(found) and found is not front:
                    yield f"{node.module}.{alias.name}{parameters_of(found)}"


def test_what_we_take_from_upstream_is_as_it_was():
    recorded, found = set(TABLE.read_text().splitlines()), {*members(), *imports()}
    report = [f"gone or changed: {line}" for line in recorded - found] + [f"new: {line}" for line in found - recorded]
    assert not report, "look at what each of these does to us, then make tests/data/upstream.txt say it:\n" + "\n".join(
        sorted(report)
    )


def test_private_names_of_other_objects_are_known_upstream():
    for name, module in READ.items():
        known = name in inspect.getsource(importlib.import_module(module))
        assert known, f"{module} has no {name} any more"


def test_every_private_name_that_is_read_of_another_object_is_listed():
    """`config._x`, `getattr(part, "_x")`: ours, or in READ."""
    ours, used = {"_fields"}, {}  # of a NamedTuple: the standard library's, and documented
    for module in our_modules():
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()", "sys"):
                used[node.attr] = f"{module.__name__}:{node.lineno}"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant):
                    used[str(name.value)] = f"{module.__name__}:{node.lineno}"
    private = {name: place for name, place in used.items() if re.match("_[a-z]", name)}
    listed = {line.split("(")[0].split(".")[-1] for line in TABLE.read_text().splitlines()} | {*READ}
    assert {name: place for name, place in private.items() if name not in ours | listed} == {}
