"""``nsa-gen doctor``: what is installed, which GPU, which folders, and step by step which config each kernel gets and why."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib import metadata, util
from typing import Any

from . import device as devices
from . import lookup, paths, table
from . import spec as specs
from .config import Shape, cache_of, problems
from .device import Device
from .errors import NSAError, TargetError
from .render import render
from .versions import LEAST, parsed

#: Oldest versions the kernels are tested with; what works without the optional ones.
NEEDED = {**LEAST, "jinja2": (3, 1), "pyyaml": (6, 0)}
OPTIONAL = {"optuna": "nsa-gen tune", "matplotlib": "bench --plot, report --plot"}
VARIABLES = ("NSA_GEN_CACHE", "NSA_GEN_TUNED", "NSA_GEN_STRICT", "NSA_GEN_WORKSPACE", "TRITON_INTERPRET", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``level``: ``ok``, ``note`` (works, but know it) or ``bad`` (``text`` says what mends it)."""

    section: str
    level: str
    text: str


@dataclass
class Examination:
    """All findings, in order; ``str()`` is the report."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.level != "bad" for finding in self.findings)

    def add(self, section: str, level: str, text: str) -> None:
        self.findings.append(Finding(section, level, text))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        return {"ok": self.ok, "findings": [vars(finding) for finding in self.findings]}

    def __str__(self) -> str:
        lines, section = [], None
        for finding in self.findings:
            if finding.section != section:
                section = finding.section
                lines.append(section)
            lines.append(f"  {finding.level:4s}  {finding.text}")
        return "\n".join(lines)


def examine(spec: str, seqlen: int, target: str | None = None) -> Examination:
    """Look at everything a wrong or slow result may come from.

    Args:
        spec: its kernels are resolved, at ``seqlen`` tokens and one sequence.
        target: device slug or arch to resolve for; default: the GPU, else the interpreter.

    Raises:
        SpecError, TargetError: no such spec or target.
    """
    chosen = specs.load(spec)
    found = Examination()
    _versions(found)
    here = _gpu(found)
    _folders(found)
    resolved_for = devices.from_name(target) if target else here or devices.from_name("interpreter")
    _tables(found, resolved_for)
    section = f"resolution of {chosen.name} at {seqlen} tokens on {resolved_for.slug}"
    for problem in (*problems(chosen), *problems(chosen, cached=cache_of(chosen))):
        try:
            _resolution(found, section, problem, Shape(seqlen, chosen.heads.kv), resolved_for)
        except NSAError as error:
            found.add(section, "bad", f"{problem.kernel}: {error}")
    return found


def _versions(found: Examination) -> None:
    from . import __version__

    found.add("versions", "ok", f"nsa-gen {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for name, least in NEEDED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.add("versions", "bad", f"{name} is not installed: pip install '{name}>={'.'.join(map(str, least))}'")
            continue
        if parsed(version) < least:
            found.add("versions", "bad", f"{name} {version} is older than {'.'.join(map(str, least))}: pip install -U {name}")
        else:
            found.add("versions", "ok", f"{name} {version}")
    for name, use in OPTIONAL.items():
        if util.find_spec(name) is None:
            found.add("versions", "note", f"{name} is not installed; needed for {use}")


def _gpu(found: Examination) -> Device | None:
    try:
        here = devices.current()
    except TargetError as error:
        found.add("GPU", "note", str(error))
        return None
    except ImportError as error:
        found.add("GPU", "bad", f"torch cannot be imported: {error}")
        return None
    found.add(
        "GPU", "ok", f"{here.name}: {here.slug}, {here.arch}, {here.sm_count} SMs, {here.shared_bytes} bytes of shared memory a block"
    )
    if here.slug not in {known.slug for known in devices.devices()}:
        found.add("GPU", "note", f"not a GPU known by name: tables are looked for under {here.slug}, then borrowed from its arch")
    return here


def _folders(found: Examination) -> None:
    for name, folder in (("templates", paths.templates()), ("specs", paths.specs())):
        count = sum(1 for path in folder.glob("*") if path.is_file()) if folder.is_dir() else 0
        found.add("folders", "ok" if count else "bad", f"{name}: {folder} ({count} files)" + ("" if count else ": reinstall nsa-gen"))
    cache = paths.cache()
    nearest = next(parent for parent in (cache, *cache.parents) if parent.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        found.add("folders", "ok", f"cache: {cache}")
    else:
        found.add(
            "folders", "note", f"cache: {cache} is not writable: kernels are rendered anew each run; set NSA_GEN_CACHE to a writable folder"
        )
    for name in VARIABLES:
        if name in os.environ:
            found.add("folders", "note", f"{name}={os.environ[name]}")


def _tables(found: Examination, device: Device) -> None:
    folder = paths.tuned() / device.slug
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        found.add(
            "tables", "note", f"none for {device.slug} in {paths.tuned()}: rows are borrowed, or defaults used; nsa-gen tune makes some"
        )
    for path in files:
        try:
            read = table.Table.load(path)
        except NSAError as error:
            found.add("tables", "bad", str(error))
            continue
        foreign = (read.device_slug, read.kernel) != (device.slug, path.stem)
        stale = sum(render(row.problem, row.config).digest != row.source_digest for row in read.rows) if not foreign else 0
        text = f"{path}: {len(read.rows)} rows" + (f", {stale} measured on another rendering than today's" if stale else "")
        found.add(
            "tables", "bad" if foreign else "note" if stale else "ok", f"{text}, of {read.device_slug}/{read.kernel}" if foreign else text
        )
    user = sum(1 for _ in (paths.cache() / "tuned" / device.slug).glob("*/*.json"))
    found.add("tables", "ok", f"{user} entries of your own in {paths.cache() / 'tuned' / device.slug}")


def _resolution(found: Examination, section: str, problem: Any, shape: Shape, device: Device) -> None:
    taken = lookup.resolve(problem, shape, device, digest_of=lambda p, c: render(p, c).digest)
    knobs = " ".join(f"{name}={value}" for name, value in taken.config.values)
    found.add(section, "ok" if taken.exact and not taken.stale else "note", f"{problem.kernel} ({taken.source}): {knobs}")
    for step in (step for step in taken.tried if taken.row is not None or step not in taken.reason):
        found.add(section, "note", f"    passed over: {step}")
    if taken.row is not None:
        perf = taken.row.perf
        found.add(section, "ok", f"    row {taken.row.where}: {perf['median_ms']:.4g} ms, default {perf['default_ms']:.4g} ms")
    elif taken.source != "override":
        found.add(section, "note", f"    {taken.reason}")
