"""Manifests, states and pointers of checkpoints as accidents and strangers make them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.checkpoint import layout
from pretrain.core.files import file_sha256

Change = Callable[[Path], None]
SHA = "0" * 64


def seal(folder: Path) -> None:
    """Write the manifest of what is there, as if nothing had been changed."""
    entries = {
        path.relative_to(folder).as_posix(): layout.file_entry(path)
        for path in layout.payload_files(folder)
    }
    layout.write_manifest(folder, entries)


def edited(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Another manifest, made from the right one's ``files``."""

    def apply(folder: Path) -> None:
        path = folder / layout.MANIFEST
        content = json.loads(path.read_text())
        found = change(content["files"])
        path.write_text(json.dumps(content if found is None else found))

    return apply


def text(content: bytes) -> Change:
    return lambda folder: (folder / layout.MANIFEST).write_bytes(content) and None


def named(name: str) -> Change:
    """A further entry, with the true size and SHA-256 of a file outside of the folder."""

    def add(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.write_text("secret")
        entry = {"bytes": 6, "sha256": file_sha256(outside)}
        edited(lambda files: files.update({name.replace("OUTSIDE", str(outside)): entry}))(folder)

    return add


def entry(**fields: Any) -> Change:
    return edited(lambda files: files[layout.STATE].update(fields))


def instead(name: str, make: Callable[[Path, Path], None]) -> Change:
    """In place of a file: ``make`` gets its path and that of its content outside."""

    def apply(folder: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        make(folder / name, outside)

    return apply


def link_of_a_folder(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret")
    (folder / "deep").symlink_to(outside)
    edited(lambda files: files.update({"deep/file": layout.file_entry(outside / "file")}))(folder)


def file_in_a_folder(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "b").write_text("x")


NAMES = (
    "../outside",
    "../../etc/passwd",
    "/etc/passwd",
    "OUTSIDE",
    "deep/../../outside",
    "./state.json",
    "a/../state.json",
    "deep//file",
    "state.json/",
    "state.json/.",
    ".",
    "..",
    "",
    "/",
    "~/file",
    "STATE.JSON",
    "state.json ",
    "state.json\0",
    "state.json\n",
    "..\\outside",
    "C:\\outside",
    "x" * 300,
    "x/" * 5000 + "x",
    "\ud800",
    "ﬁle",
    "state.json\u200b",
    "st\u0430te.json",
    "\u202egnosj.etats",
    "manifest.json",
    "%2e%2e/outside",
    "file:///etc/passwd",
    "deep",
)
FILES: dict[str, Change] = {
    "a link to a file outside": instead("recipe.yaml", lambda path, out: path.symlink_to(out)),
    "a relative link": instead("state.json", lambda path, out: path.symlink_to("../outside")),
    "a link that leads nowhere": instead("state.json", lambda path, out: path.symlink_to("no")),
    "a link to itself": instead("state.json", lambda path, out: path.symlink_to(path)),
    "a link inside": lambda folder: (folder / "more").symlink_to("state.json"),
    "a link to a folder outside": link_of_a_folder,
    "a folder in place of a file": instead("recipe.yaml", lambda path, out: path.mkdir()),
    "a pipe in place of a file": instead("recipe.yaml", lambda path, out: os.mkfifo(path)),
    "another pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "a file that is not listed": lambda folder: (folder / "more.txt").write_text("x") and None,
    "a hidden file": lambda folder: (folder / ".more").write_text("") and None,
    "code": lambda folder: (folder / "evil.py").write_text("") and None,
    "a file in a new folder": file_in_a_folder,
    "a listed file is gone": lambda folder: (folder / "tokenizer.json").unlink(),
}
MANIFESTS: dict[str, Change] = {
    "no files": edited(lambda files: files.clear()),
    "one file less": edited(lambda files: files.pop("tokenizer.json") and None),
    "no state": edited(lambda files: files.pop("state.json") and None),
    "null": text(b"null"),
    "an object": text(b"{}"),
    "a list": text(b"[]"),
    "a number": text(b"1e400"),
    "files of null": text(b'{"version": 1, "files": null}'),
    "files as a list": text(b'{"version": 1, "files": ["state.json"]}'),
    "files as text": text(b'{"version": 1, "files": "state.json"}'),
    "entries of null": edited(lambda files: files.update(dict.fromkeys(files))),
    "entries as a list": edited(lambda files: files.update({"state.json": [1, SHA]})),
    "100,000 lists": text(b"[" * 100_000),
    "500 objects": text(b'{"files":' * 500 + b"1" + b"}" * 500),
    "nothing": text(b""),
    "half of it": lambda folder: text((folder / layout.MANIFEST).read_bytes()[:99])(folder),
    "not UTF-8": text(b'{"version": 1, "files": {"\xff": 1}}'),
    "UTF-16": lambda folder: text((folder / layout.MANIFEST).read_text().encode("utf-16"))(folder),
    "a byte order mark": lambda folder: text(
        b"\xef\xbb\xbf" + (folder / layout.MANIFEST).read_bytes()
    )(folder),
    "zeros": text(bytes(5000)),
    "NaN": text(b'{"version": 1, "files": NaN}'),
    "a number of 5,000 digits": text(b'{"version": ' + b"1" * 5000 + b"}"),
    "two files": lambda folder: text(
        (folder / layout.MANIFEST).read_bytes().replace(b'"files"', b'"files": {}, "files"')
    )(folder),
    "an entry twice": lambda folder: text(
        (folder / layout.MANIFEST)
        .read_bytes()
        .replace(b'"state.json"', b'"state.json": 1, "state.json"')
    )(folder),
    "another version": edited(lambda files: {"version": 99, "files": files}),
    "a version of true": edited(lambda files: {"version": True, "files": files}),
    "no version": edited(lambda files: {"files": files}),
    "a size as text": entry(bytes="12"),
    "a negative size": entry(bytes=-1),
    "a size of true": entry(bytes=True),
    "a size of null": entry(bytes=None),
    "a broken size": entry(bytes=12.5),
    "a size of 1e400": lambda folder: text(
        (folder / layout.MANIFEST).read_bytes().replace(b'"bytes": ', b'"bytes": 1e400, "x": ')
    )(folder),
    "a size of 2^70": entry(bytes=1 << 70),
    "a SHA-256 of 5": entry(sha256=5),
    "a short SHA-256": entry(sha256="00"),
    "a SHA-256 in capitals": entry(sha256="A" * 64),
    "a SHA-256 of null": entry(sha256=None),
    "another SHA-256": entry(sha256=SHA),
}


def state(**fields: Any) -> Change:
    """Another state, whose size and SHA-256 the manifest has."""

    def apply(folder: Path) -> None:
        path = folder / layout.STATE
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        seal(folder)

    return apply


def sealed(name: str, content: bytes) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)
        seal(folder)

    return apply


STATES: dict[str, Change] = {
    "step as text": state(step="x"),
    "step of null": state(step=None),
    "step of true": state(step=True),
    "a negative step": state(step=-1),
    "a broken step": state(step=1.5),
    "a step of 2^70": state(step=1 << 70),
    "progress of null": state(progress=None),
    "progress as a list": state(progress=[1]),
    "progress with a wrong step": state(progress={"step": "1"}),
    "progress with wrong epochs": state(progress={"epoch_steps": {"1": "2"}}),
    "data of null": state(data=None),
    "data as text": state(data="x"),
    "guards as a list": state(guards=[]),
    "guards with wrong losses": state(guards={"losses": ["x"]}),
    "engine of null": state(engine=None),
    "engine with wrong steps": state(engine={"steps": "1"}),
    "a time as text": state(saved_at="now"),
    "tokens as text": state(consumed_tokens="5"),
    "a loss as text": state(validation_loss="low"),
    "a phase of 5": state(phase=5),
    "a tokenizer of 5": state(tokenizer_sha256=5),
    "sources as a list": state(sources=[1]),
    "parameters of null": state(parameters=None),
    "a list": sealed("state.json", b"[]"),
    "null": sealed("state.json", b"null"),
    "no step": sealed("state.json", b"{}"),
    "nothing": sealed("state.json", b""),
    "100,000 lists": sealed("state.json", b"[" * 100_000),
    "not UTF-8": sealed("state.json", b'{"step": 1, "phase": "\xff"}'),
    "step twice": sealed("state.json", b'{"step": 1, "step": 2}'),
}
RECIPES: dict[str, Change] = {
    "nothing": sealed("recipe.yaml", b""),
    "null": sealed("recipe.yaml", b"null"),
    "a list": sealed("recipe.yaml", b"[1, 2]"),
    "text": sealed("recipe.yaml", b"just text"),
    "not UTF-8": sealed("recipe.yaml", b"name: \xff"),
    "no YAML": sealed("recipe.yaml", b"a: [}"),
    "a model of 5": sealed("recipe.yaml", b"name: x\nmodel: 5"),
    "a model of null": sealed("recipe.yaml", b"name: x\nmodel: null\ntrain: []"),
    "no date": sealed("recipe.yaml", b"name: 2020-13-45"),
    "5,000 lists": sealed("recipe.yaml", b"[" * 5000),
    "a call": sealed("recipe.yaml", b"name: !!python/object/apply:os.system ['touch canary']"),
    "aliases of aliases": sealed(
        "recipe.yaml",
        b"a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n"
        + b"".join(
            b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12)
        ),
    ),
    "itself": sealed("recipe.yaml", b"name: &a {b: *a}"),
    "a key twice": sealed("recipe.yaml", b"name: x\nname: y"),
    "2 MB": sealed("recipe.yaml", b"# " + b"x" * 2_000_000),
}


def pointer(content: bytes) -> Change:
    return lambda latest: latest.write_bytes(content) and None


# What the file ``latest`` may be; the change gets its path, where nothing is.
POINTERS: dict[str, Change] = {
    "a folder": lambda latest: latest.mkdir(),
    "a pipe": lambda latest: os.mkfifo(latest),
    "a link that leads nowhere": lambda latest: latest.symlink_to("nowhere"),
    "a link to itself": lambda latest: latest.symlink_to("latest"),
    "nothing": pointer(b""),
    "huge": pointer(b"step_1\n" * 1_000_000),
    "binary": pointer(bytes(range(150))),
    "NUL": pointer(b"step_1\0"),
    "not UTF-8": pointer(b"step_1\xff"),
    "outside": pointer(b"../elsewhere/step_1"),
    "up and down": pointer(b"step_1/../.."),
    "absolute": pointer(b"/etc"),
    "two names": pointer(b"step_1\nstep_2"),
    "a dot": pointer(b"."),
    "two dots": pointer(b".."),
    "negative": pointer(b"step_-1"),
    "without number": pointer(b"step_"),
    "leading zeros": pointer(b"step_01"),
    "Arabic digits": pointer("step_١".encode()),
    "in capitals": pointer(b"STEP_1"),
    "a deeper folder": pointer(b"step_1/deep"),
    "long": pointer(b"step_" + b"1" * 190),
    "of a step that is gone": pointer(b"step_77"),
    "another file": pointer(b'{"step": 1}'),
}
